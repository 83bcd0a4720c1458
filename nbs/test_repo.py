"What pytest checks of the checkout besides running its pages: each test is one rule of the house, and says which."
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import warnings
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml
from execnb.nbio import loads, nb2str
from fastcore.docments import docments
from nbdev.clean import clean_nb
from nbdev.process import NBProcessor
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import NBS, ROOT, SETTINGS

SETTINGS = SETTINGS["DEFAULT"]
LIB = ROOT / SETTINGS["lib_path"]
PAGES = sorted(path for path in NBS.glob("*.ipynb") if path.name[0] not in "_.")
TOPICS = [page for page in PAGES if re.match(r"[1-8]\d_", page.name)]
MODULES = sorted(path.stem for path in LIB.glob("*.py") if path.name[0] != "_")
HEADS = ["What it claims", "Smallest example by hand", "The method", "It obeys its laws", "The figure you came for",
         "Against the alternatives", "Where it fails", "At paper scale"]
BUILDS_ON = {  # The topics that stand on another
    "bilevel": {"hypergrad"},
    "decision": {"spectral"},
    "gradient_index": {"similarity"},
}
ONE_SIZE = {"11_decision"}  # topic pages without a `scale(` cell: they run at one size

# --- what a page or module may differ in; everything here is named, and meant to shrink ---

MAIN = {  # What a topic page is about: its first live call stands by cell 15. Several names: any of them
    "10_spectral": ["trade_off"],
    "11_decision": ["decision_page"],
    "20_rlrp": ["rlrp"],
    "30_moram": ["regression_cam"],
    "40_akp": ["family_report", "train_family"],
    "50_similarity": ["gradient_cosine"],
    "51_gradient_index": ["GradientIndex"],
    "60_trees": ["StableTreeClassifier"],
    "61_clustering": ["StableHierarchicalClustering"],
    "70_hypergrad": ["hypergrad"],
    "71_bilevel": ["personalise"],
    "80_fairwashing": ["fairwash_front"],
    "85_correction": ["drift"],
}

LONG_CELLS = {  # Exported definitions that cannot be cut into cells of 25 lines
    "09_implicit": {"Local"},
    "09_networks": {"Schedule", "Node", "InProcessNetwork", "_Stack", "MatrixNetwork", "_Reports", "_Wire",
                    "TorchDistributedNetwork"},
    "70_hypergrad": {"_Trace"},
    "71_bilevel": {"Served", "Personalised"},
    "00_core": {"_Tap"},
    "01_data": {"Images", "Preparation"},
    "03_attribution": {"_LayerSearch"},
    "07_per_example": {"Outer", "_Call", "_Recorder", "Coverage", "BatchGradients", "JoinedExamples", "Gram", "_Sums"},
    "08_lrp": {"_Engine", "_Shares", "Relevance", "_Watch"},
    "09_representations": {"_Sums", "StreamingCKA", "Features", "SimilarityMonitor"},
    "09_stress": {"Swap", "_Site", "HotSwapper"},
    "09_spectrum": {"ExplanationGap"},
    "09_split_kernel": {"Grown"},
    "50_similarity": {"Neighbours"},
    "60_trees": {"_StableTree", "StableForestClassifier", "StableForestRegressor", "_Boosting",
                 "StableGradientBoostingClassifier"},
    "61_clustering": {"StableHierarchicalClustering"},
    "51_gradient_index": {"GradientIndex", "Sketch", "_Lock", "_Shard", "_Header"},
    "30_moram": {"RegressionCAM"},
}

PENDING = {  # Rule -> what does not obey it yet. A listed one that obeys gives a warning: take it off
    "width": set(),
    "length": set(),
    "plain": set(),
    "density": set(),
    "exported cells": set(),
    "first call and figure": set(),
    "visible imports": set(),
    "alt text": set(),
    "one home": set(),
    "torch-free": set(),
    "thumbnail": set(),
}


def obeys(rule, name, faults):
    "Fail on the faults, unless the rule is still pending for this page or module."
    if name not in PENDING[rule]:
        assert not faults, f"{rule}:\n" + "\n".join(map(str, faults))
    elif faults:
        pytest.xfail(f"{rule}: {name} is still in PENDING")
    else:
        warnings.warn(f"{rule}: {name} obeys now, take it off PENDING", pytest.PytestWarning)



def git_status():
    "What git would commit; None where this is no git checkout."
    git = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    return git.stdout if git and git.returncode == 0 else None


STATUS_BEFORE = git_status()  # at collection, before any page has run


def each(paths):
    "Run a test once for each page or module, named after it."
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def python(*command, folder=ROOT, blank=("IN_TEST",)):
    "Run Python on the package of this checkout; its output, or a failure that shows what went wrong."
    env = {key: value for key, value in os.environ.items() if key not in blank} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    "The pages and the settings in a folder of their own, where files may be written."
    shutil.copytree(NBS, tmp_path / NBS.name, ignore=shutil.ignore_patterns("__pycache__", ".*", "_*"))
    shutil.copy(NBS / "_quarto.yml", tmp_path / NBS.name)
    for name in ["settings.ini", "_quarto.yml"]:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def cells(path, kind="code"):
    "Cells of a page with their number (from 1) and their flags."
    return [(n, cell) for n, cell in enumerate(NBProcessor(path, rm_directives=False).nb.cells, 1) if cell.cell_type == kind]


def outputs(path):
    "Committed outputs of a page with the number of their cell."
    return [(n, out) for n, cell in cells(path) for out in cell.outputs]


def is_exported(cell):
    return any(flag.startswith("export") for flag in cell.directives_ or {})


def tree(cell):
    "The parsed code of a cell, without magics."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M))


# --- the package is what the pages export ---


def test_export_is_in_sync(copy):
    "xai_nb/ is what `nbdev_export` makes of the pages."
    (copy / LIB.name).mkdir()
    shutil.copy(LIB / "__init__.py", copy / LIB.name)
    python("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", folder=copy)
    made = {path.name: path.read_text(encoding="utf-8") for path in (copy / LIB.name).glob("*.py")}
    here = {path.name: path.read_text(encoding="utf-8") for path in LIB.glob("*.py")}
    stale = [name for name in sorted(made | here) if made.get(name) != here.get(name)]
    assert not stale, f"run nbdev_export; out of step or without a page: {stale}"


IMPORT_ALONE = """
import importlib, sys
modules, blocked = (set(text.split()) for text in sys.argv[1:])
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked: raise ModuleNotFoundError(f"{name} is not a runtime requirement", name=name)
sys.meta_path.insert(0, Block())
for module in sorted(modules):
    for name in [name for name in sys.modules if name.split(".")[0] == "xai_nb"]: del sys.modules[name]
    importlib.import_module("xai_nb." + module)
"""


def test_modules_import_with_the_runtime_requirements_alone():
    "Each module imports by itself without any development package and without ipywidgets."
    dev = [Requirement(text).name for text in SETTINGS["dev_requirements"].split()]
    python("-c", IMPORT_ALONE, " ".join(MODULES), " ".join([*dev, "ipywidgets", "IPython"]))


WITHOUT_TORCH = {"core", "metrics", "trees", "tree_sensitivity", "clustering", "fairwashing", "split_kernel", "site", "cli"}


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH & set(MODULES)))
def test_import_does_not_load_torch(name):
    "What needs no tensor does not pay for torch, nor for reading the comments that help() shows."
    said = python("-c", f"import xai_nb.{name}, sys; print(*[m for m in ('torch', 'xai_nb.site') if m in sys.modules])")
    loaded = set(said.split()) - {f"xai_nb.{name}"}
    obeys("torch-free", name, [f"import xai_nb.{name} loads {', '.join(loaded)}"] * bool(loaded))


def imports(path):
    "Dotted names that a module imports; of its own package, `.name`."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * min(node.level, 1) + (node.module or "")
            yield from [base] if node.module else ("." + alias.name for alias in node.names)


ALL_MODULES = each([LIB / f"{name}.py" for name in MODULES])


@ALL_MODULES
def test_module(path):
    "No fastcore, no topic inside a topic, no name that pytest would collect, no function over 30 lines."
    topics = {page.stem[3:] for page in TOPICS}
    used = {home_of(name) for name in imports(path)}
    allowed = {path.stem} | BUILDS_ON.get(path.stem, set())
    foreign = (used & topics) - allowed if path.stem in topics else set()
    assert not foreign, f"topic {path.stem} imports topics {foreign}"
    assert "fastcore" not in {name.split(".")[0] for name in used}, "exported code imports fastcore"
    functions = functions_of(path)
    assert not [f.name for f in functions if f.name.startswith("test_")]
    obeys("length", path.stem, [f"{f.name} has {lines} lines" for f in functions if (lines := body_lines(f)) > 30])


def home_of(name):
    "The module that a dotted import means: `rlrp` for `.rlrp` and `xai_nb.rlrp`; a foreign name as it is."
    inside = name.startswith((".", "xai_nb."))
    return name.replace("xai_nb.", ".").split(".")[1] if inside else name


def module_tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(path):
    "Every function and method of a module."
    return [node for node in ast.walk(module_tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_of(function):
    "The statements after the docstring."
    return function.body[1:] if ast.get_docstring(function) else function.body


@each([LIB / f"{name}.py" for name in MODULES])
def test_a_module_defines_a_name_once(path):
    "No second definition hides a first one; overloads are declarations."
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in body if isinstance(node, kinds) and not is_overload(node)]
    assert len(names) == len(set(names)), f"defined twice: {sorted({name for name in names if names.count(name) > 1})}"


def is_overload(node):
    return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list)


def body_lines(function):
    "Lines of a function from the first statement after its docstring."
    body = body_of(function)
    return function.end_lineno - body[0].lineno + 1 if body else 0


@ALL_MODULES
def test_width(path):
    "Width is length: at most 110 columns."
    lines = path.read_text(encoding="utf-8").splitlines()
    heads = [line if line.startswith("# %%") else None for line in lines]  # nbdev's own lines stand above the first and in "auto"
    cell = [next((head for head in heads[n::-1] if head), "# %% auto") for n in range(len(lines))]
    ours = [(n, line) for n, line in enumerate(lines, 1) if not cell[n - 1].startswith("# %% auto")]
    wide = [f"line {n}: {len(line)} columns" for n, line in ours if len(line) > 110]
    obeys("width", path.stem, wide)


@ALL_MODULES
def test_density(path):
    "The median function has at most 20 syntax nodes a line."
    density = [sum(len(list(ast.walk(node))) for node in body_of(f)) / lines for f in functions_of(path) if (lines := body_lines(f))]
    middle = statistics.median(density or [0])
    obeys("density", path.stem, [f"{middle:.1f} syntax nodes a line, at most 20"] * (middle > 20))


@ALL_MODULES
def test_one_action_a_line(path):
    "No second statement in a line, no conditional expression in another, no assignment of a pair of unrelated things."
    obeys("plain", path.stem, [f"line {node.lineno}: {fault}" for node, fault in crowded(module_tree(path))])


def crowded(tree):
    "Nodes that do two things at once."
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not is_ellipsis(node):
            if node.lineno in lines and not isinstance(lines[node.lineno], ast.Module):
                yield node, "two statements in one line"
            lines[node.lineno] = node
        if isinstance(node, ast.IfExp) and any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse, node.test)):
            yield node, "a conditional expression inside another"
        if isinstance(node, ast.Assign) and is_pair(node.value) and is_pair(node.targets[0]) and not is_related(node):
            yield node, "unrelated things in one assignment"


def is_ellipsis(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def is_pair(node):
    return isinstance(node, ast.Tuple) and not any(isinstance(part, ast.Starred) for part in node.elts)


def is_related(node):
    "A swap, or parts of one kind, such as two calls: `low, high = x.min(), x.max()`."
    names = [{part.id for part in ast.walk(side) if isinstance(part, ast.Name)} for side in (node.targets[0], node.value)]
    return bool(names[0] & names[1]) or len({type(part) for part in node.value.elts}) == 1


def test_a_name_has_one_home():
    "No two modules export one name."
    homes = {}
    for name in MODULES:
        exported = next(node.value for node in module_tree(LIB / f"{name}.py").body if is_all(node))
        for symbol in ast.literal_eval(exported):
            homes.setdefault(symbol, []).append(name)
    twice = {symbol: modules for symbol, modules in homes.items() if len(modules) > 1}
    found = [f"{symbol}: {modules}" for symbol, modules in twice.items() if symbol not in PENDING["one home"]]
    assert not found, "\n".join(found)
    if cured := PENDING["one home"] - twice.keys():
        warnings.warn(f"one home: take off PENDING {cured}", pytest.PytestWarning)


def is_all(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"


@ALL_MODULES
def test_every_parameter_is_documented(path):
    "Each parameter, return and field of a public symbol has an annotation and a comment."
    symbols = importlib.import_module("xai_nb._modidx").d["syms"].get(f"xai_nb.{path.stem}", {})
    module = importlib.import_module(f"xai_nb.{path.stem}")
    names = [symbol.split(".", 2)[2] for symbol in symbols]
    missing = [gap for name in names if is_public(name) for gap in gaps(module, name)]
    assert not missing, "\n".join(missing)


def is_public(name):
    "`fit`, `Timing`, `Timing.__init__`; not `_seconds`, `_Private.method` or another dunder."
    return all(part[0] != "_" or part == "__init__" for part in name.split("."))


def gaps(module, name):
    "What is missing in the documentation of one symbol."
    thing = module
    for part in name.split("."):
        thing = inspect.getattr_static(thing, part)
    if isinstance(thing, (staticmethod, classmethod)):
        thing = thing.__func__
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if inspect.isclass(thing) and not is_dataclass(thing) or not callable(thing):
        return []  # what a plain class takes stands at its __init__, a symbol of its own
    signature = inspect.signature(thing)
    annotations = {name: p.annotation for name, p in signature.parameters.items()} | {"return": signature.return_annotation}
    comments = docments(thing, args_kwargs=True)
    no_return = inspect.isclass(thing) or name.endswith("__init__")
    for parameter in annotations:
        if parameter in ("self", "cls") or parameter == "return" and no_return:
            continue
        if annotations[parameter] is inspect.Signature.empty:
            yield f"{name}: {parameter} has no annotation"
        if not comments.get(parameter) and annotations[parameter] is not None:
            yield f"{name}: {parameter} has no comment"


# --- the pages are clean, small and laid out alike ---


@each(PAGES)
def test_page_is_clean(path):
    "As `nbdev_clean` leaves it: no execution counts, no metadata, no addresses."
    text = path.read_text(encoding="utf-8")
    nb = loads(text)
    clean_nb(nb, clean_ids=True)
    assert nb2str(nb) == text, "run nbdev_clean"
    assert not [n for kind in ("code", "markdown", "raw") for n, cell in cells(path, kind) if cell.metadata], "cell metadata"
    assert set(nb["metadata"]) == {"kernelspec"}, "notebook metadata (widget state?)"


PATHS = re.compile(r"(?<![\w.:/~-])/(home|root|Users|tmp|work|var|private|opt|mnt|usr)/|\b[A-Z]:\\\\?[A-Za-z]")


def text_of(out):
    "The text of an output, of all its kinds but pictures."
    texts = [value for kind, value in out.get("data", {}).items() if not kind.startswith("image/")]
    return json.dumps(texts) if texts else "".join(out.get("text", ""))


@each(PAGES)
def test_outputs_are_fit_to_publish(path):
    "No error, no stderr, no widget, no path of somebody's machine, figures up to 350 kB, the page up to 1.5 MB."
    bad = [f"cell {n}: {fault}" for n, out in outputs(path) for fault in faults(out)]
    bad += [f"cell {n}: a path of one machine" for n, cell in cells(path) + cells(path, "markdown") if PATHS.search(cell.source)]
    assert not bad, "\n".join(bad)
    assert path.stat().st_size <= 1_500_000, f"{path.stat().st_size / 1e6:.1f} MB"


def faults(out):
    "What must not be in a committed output."
    if out.output_type == "error" or out.get("name") == "stderr":
        yield out.get("ename", "stderr output")
    if any("widget" in kind for kind in out.get("data", {})):
        yield "a widget"
    if PATHS.search(text_of(out)):
        yield "a path of one machine"
    for kind, value in out.get("data", {}).items():
        size = len("".join(value)) * (0.75 if not kind.endswith("svg+xml") else 1)
        if kind.startswith("image/") and size > 350_000:
            yield f"a figure of {size / 1000:.0f} kB"


@each(PAGES)
def test_cells(path):
    "An import stands in a cell of imports alone (the docs build runs such cells); at most 15 lines where nothing is exported."
    for n, cell in cells(path):
        nodes = tree(cell)
        found = nodes.body if is_exported(cell) else list(ast.walk(nodes))
        mixed = any(map(is_import, found)) and not all(is_import(node) or is_docstring(node) for node in nodes.body)
        assert not mixed, f"cell {n} has an import and other code\n{cell.source}"
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
        only_imports = all(is_import(node) for node in nodes.body)
        is_peer = "peer" in (cell.directives_ or {}) and any(map(is_import, ast.walk(nodes)))
        assert not is_peer, f"cell {n}: the docs build runs imports, and the peer is not there: use __import__"
        assert is_exported(cell) or only_imports or len(lines) <= 15, f"cell {n} has {len(lines)} lines"


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@each(PAGES)
def test_page_head(path):
    "A title and a one-line subtitle first."
    first = loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n+> \S", "".join(first["source"])), "expected '# Title' and '> one-line subtitle'"


@each(PAGES)
def test_exported_cells(path):
    "An exported cell has at most 25 lines; a signature counts as one, whatever its number of parameters."
    long = [(n, names, lines) for n, cell in cells(path) if is_exported(cell) and (lines := cell_lines(cell)) > 25
            if not (names := defined(cell)) & LONG_CELLS.get(path.stem, set())]
    obeys("exported cells", path.stem, [f"cell {n} has {lines} lines: {', '.join(names)}" for n, names, lines in long])


def defined(cell):
    "Names of the functions and classes that a cell defines."
    return {node.name for node in tree(cell).body if hasattr(node, "name")}


def cell_lines(cell):
    "Lines of code in a cell, without flags and blank lines, each signature as one line; a cell of imports has none."
    if all(is_import(node) for node in tree(cell).body):
        return 0
    lines = {n for n, line in enumerate(cell.source.splitlines(), 1) if line.strip() and not line.startswith("#|")}
    for node in ast.walk(tree(cell)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines -= set(range(node.lineno + 1, node.body[0].lineno))
    return len(lines)


@each(PAGES)
def test_visible_imports(path):
    "What a visible cell uses of this package, a visible cell imports: a copied cell runs."
    hidden = {name for _, cell in cells(path) if "hide" in (cell.directives_ or {}) for name in own_imports(cell)}
    used = [f"cell {n} uses {', '.join(sorted(names))}" for n, cell in cells(path) if "hide" not in (cell.directives_ or {})
            if (names := hidden & {node.id for node in ast.walk(tree(cell)) if isinstance(node, ast.Name)})]
    obeys("visible imports", path.stem, used)


def own_imports(cell):
    "Names that a cell imports from this package."
    for node in ast.walk(tree(cell)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xai_nb":
            yield from (alias.asname or alias.name for alias in node.names)


@each(PAGES)
def test_alt_text(path):
    "Every figure has a text for those who do not see it, and a caption."
    drawn = {n: cell for n, cell in cells(path) if any(is_drawing(out) for out in cell.outputs)}
    lacking = [f"cell {n} has no {flag}" for n, cell in drawn.items() for flag in ("fig-alt:", "fig-cap:")
               if flag not in cell.directives_ and "hide" not in cell.directives_]
    obeys("alt text", path.stem, lacking)


def is_drawing(out):
    return any(kind.startswith("image/") for kind in out.get("data", {}))


@each(TOPICS)
def test_topic_page(path):
    "The eight heads in order, and exactly one `scale(` cell, which is volatile."
    heads = [line[3:].strip() for _, cell in cells(path, "markdown") for line in cell.source.splitlines() if line.startswith("## ")]
    assert heads == HEADS
    scaled = [cell for _, cell in cells(path) if calls(cell, "scale")]
    if path.stem in ONE_SIZE and not scaled:
        return
    assert len(scaled) == 1, f"{len(scaled)} cells call scale()"
    assert "volatile" in scaled[0].directives_, "the run card differs between machines: flag its cell `#| volatile`"


@each(TOPICS)
def test_the_product_comes_first(path):
    "By cell 15 (counted from 0) the page has called what it is about, live, and shown a figure."
    assert path.stem in MAIN, f"name in MAIN what {path.stem} is about"
    called = [n - 1 for n, cell in cells(path) if is_live(cell) and any(uses(cell, name) for name in MAIN[path.stem])]
    drawn = [n - 1 for n, cell in cells(path) if any(is_drawing(out) for out in cell.outputs)]
    late = [f"first {what} in cell {min(found, default=None)}, cell 15 at the latest"
            for what, found in [(f"live call of {MAIN[path.stem]}", called), ("figure", drawn)] if min(found, default=99) > 15]
    obeys("first call and figure", path.stem, late)


def is_live(cell):
    "Whether a cell runs in a quick run and exports nothing."
    skipped = set(SETTINGS["tst_flags"].split())
    return not is_exported(cell) and not skipped & (cell.directives_ or {}).keys()


def calls(cell, name):
    "Whether a cell calls a function of this name."
    return any(getattr(node.func, "id", "") == name for node in ast.walk(tree(cell)) if isinstance(node, ast.Call))


def uses(cell, name):
    "Whether a cell calls a function or class of this name, or a method of the class."
    functions = [node.func for node in ast.walk(tree(cell)) if isinstance(node, ast.Call)]
    return calls(cell, name) or any(getattr(getattr(f, "value", None), "id", "") == name for f in functions)


# --- the site, the README, the requirements ---

PROCESS = """
import warnings
from nbdev.serve import proc_nbs
warnings.simplefilter("error", UserWarning)
if __name__ == "__main__": proc_nbs(n_workers=0)
"""


def test_docs_process(copy):
    "nbdev turns every page into its page of the site, without a warning."
    (copy / "process.py").write_text(PROCESS, encoding="utf-8")
    said = python("process.py", folder=copy)
    assert "imports and other code" not in said, said
    assert {page.name for page in PAGES} <= {page.name for page in (copy / "_proc").glob("*.ipynb")}
    made = {page: (copy / "_proc" / page.name).read_text(encoding="utf-8") for page in PAGES}
    anchors = {f"{site_name(page)}#{name}" for page, text in made.items() for name in re.findall(r"\{#([\w.]+) \.api", text)}
    links = {link for text in made.values() for link in re.findall(r"\]\((\w+\.html#[\w.]+)\)", text)}
    assert not links - anchors, f"links to entries that no page has: {sorted(links - anchors)}"


def site_name(page):
    "The page of the site that a notebook becomes."
    return re.sub(r"^\d+_", "", page.stem) + ".html"


def test_site_configuration():
    "nbs/_quarto.yml only includes the top-level file, whose sidebar names every page once."
    stub = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert stub == {"project": {"type": "website"}, "metadata-files": ["../_quarto.yml", "nbdev.yml"]}
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    listed = [name for part in site["website"]["sidebar"]["contents"] for name in part["contents"]]
    assert sorted(listed) == sorted(page.name for page in PAGES)


def test_readme_is_index():
    "README.md is what `xai_nb readme` makes of nbs/index.ipynb."
    from xai_nb.cli import readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(ROOT), "run xai_nb readme"


def test_index():
    "The landing page is also the README: absolute links only, no picture outputs. Its table leads to every topic."
    page = NBS / "index.ipynb"
    links = [link for _, cell in cells(page, "markdown") for link in re.findall(r"\]\(([^)]*)\)", cell.source)]
    assert not [link for link in links if not link.startswith("https://")]
    assert not [page.stem for page in TOPICS if f"{SETTINGS['doc_host']}{SETTINGS['doc_baseurl']}/{page.stem[3:]}.html" not in links]
    assert not [n for n, out in outputs(page) for kind in out.get("data", {}) if kind.startswith("image/")]


@pytest.mark.parametrize("name", [page.stem[3:] for page in TOPICS])
def test_thumbnail(name):
    "The landing page shows a picture of each topic, which a cell of its page has written."
    text = "".join(cell.source for _, cell in cells(NBS / "index.ipynb", "markdown"))
    faults = [f"nbs/images/{name}.png is missing"] * (not (NBS / "images" / f"{name}.png").is_file())
    faults += ["the table of index.ipynb does not show it"] * (f"/images/{name}.png" not in text)
    obeys("thumbnail", name, faults)


def test_hooks_leave_a_clean_tree():
    "The line that `nbdev_install_hooks` would add to .gitattributes is there, and its .gitconfig is ignored."
    assert "\n*.ipynb merge=nbdev-merge\n" in (ROOT / ".gitattributes").read_text(encoding="utf-8")
    assert ".gitconfig" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_source_distribution(tmp_path):
    "The sdist holds what setup.py reads, the modules, and neither pages nor weights."
    kept = ["setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt"]
    for name in kept:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(LIB, tmp_path / LIB.name, ignore=shutil.ignore_patterns("__pycache__"))
    python("setup.py", "-q", "sdist", folder=tmp_path)
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*kept, f"{LIB.name}/core.py", f"{LIB.name}/py.typed"} <= names
    assert not [name for name in names if name.endswith((".ipynb", ".png", ".jpg", ".pth", ".pt"))]


def test_version_is_the_same_everywhere():
    "settings.ini, the package and CITATION.cff name one version."
    version = SETTINGS["version"]
    assert f'__version__ = "{version}"' in (LIB / "__init__.py").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version


def test_constraints_pin_every_requirement():
    "constraints.txt has one public version for each requirement, one that the requirement accepts."
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pins = {canonicalize_name((pin := Requirement(line)).name): pin.specifier for line in lines if line}
    for text in f"{SETTINGS['requirements']} {SETTINGS['dev_requirements']}".split():
        need = Requirement(text)
        version = str(pins.get(canonicalize_name(need.name), "no pin"))
        assert re.fullmatch(r"==[\w.]+", version), f"{need.name}: {version}"
        assert need.specifier.contains(version[2:]), f"{need} is not met by {version}"


def test_nothing_is_left_behind():
    "Last: the tests changed no file and left none."
    if STATUS_BEFORE is None:
        pytest.skip("not a git checkout")
    assert git_status() == STATUS_BEFORE
