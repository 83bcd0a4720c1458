__version__ = "0.1.0"

import sys as _sys
from importlib.machinery import FileFinder as _FileFinder, SourceFileLoader as _SourceFileLoader
from os.path import isdir as _isdir
from types import FunctionType as _Function


class _Doc(str):
    "A docstring that grows by the meaning of the parameters when `help` or Shift-Tab looks at it; nbs/91_site.ipynb says how."

    def expandtabs(self, tabsize=8):
        from .site import help_text

        return help_text(self.module, self.name, str(self)).expandtabs(tabsize)


def _document(thing):
    "Exchange the docstring of a function or class, and of what the class defines."
    if thing.__doc__ and not isinstance(thing.__doc__, _Doc):
        doc = _Doc(thing.__doc__)
        doc.module, doc.name = thing.__module__, thing.__qualname__
        thing.__doc__ = doc
    for part in vars(thing).values() if isinstance(thing, type) else ():
        part = getattr(part, "__func__", part)
        if isinstance(part, _Function) and part.__module__ == thing.__module__:
            _document(part)


class _Loader(_SourceFileLoader):
    "Loads a module of this package as usual, then exchanges the docstrings; no file is read for that."

    def exec_module(self, module):
        super().exec_module(module)
        for thing in list(vars(module).values()):
            if isinstance(thing, (_Function, type)) and thing.__module__ == module.__name__:
                _document(thing)


if _isdir(__path__[0]):  # not in a zip archive
    _sys.path_importer_cache[__path__[0]] = _FileFinder(__path__[0], (_Loader, [".py"]))
