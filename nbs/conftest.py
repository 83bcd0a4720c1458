"""Plain `pytest` runs every page of nbs/: each notebook once, in a child process of its own, two at a time.

A page gives two tests. `runs`: every cell executes, within the time limit. `outputs`: what that same execution prints is
what the committed page shows. Cells with a flag of `tst_flags` (settings.ini) are skipped; `#| volatile` cells run, and
their text is not compared. Settings, all by environment:

    NB_FLAGS="slow cuda"   run the cells with these flags too
    NB_TIMEOUT=600         seconds of wall time a page may take
    NB_WORKERS=2           pages at a time
    NB_PROCESSOR=plain     compute as a processor without AVX would, with two threads: the outputs must not change

On Linux the children are forked from a small server that has imported torch and friends once and has no threads. macOS
and Windows cannot fork such a process safely: there each child starts afresh (spawn), some seconds a page.
"""
import difflib
import math
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in [HERE, *HERE.parents] if (folder / "settings.ini").is_file())
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
NBS = ROOT / SETTINGS["DEFAULT"]["nbs_path"]

SKIPPED = set(SETTINGS["DEFAULT"]["tst_flags"].split()) - set(os.environ.get("NB_FLAGS", "").split())
TIME_LIMIT = float(os.environ.get("NB_TIMEOUT", 600))
WORKERS = int(os.environ.get("NB_WORKERS", 2))
SCALE = os.environ.get("XAI_NB_SCALE", "cpu")
QUICK = SCALE == "cpu" and not os.environ.get("NB_FLAGS")  # the run whose length is limited
CPU_LIMIT = 30.0  # CPU seconds of a quick run; a warning over it, a failure over twice that

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PRELOAD = ["torch", "torchvision", "sklearn", "matplotlib.pyplot", "pandas", "pytest", "nbdev.process", "execnb.shell"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "IN_TEST": "1"}
PLAIN = {  # instructions that every x86-64 processor has, in PyTorch, MKL, oneDNN and OpenBLAS
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "OMP_NUM_THREADS": "2",
}
THREADS = 1
if os.environ.get("NB_PROCESSOR") == "plain":
    ENVIRONMENT |= PLAIN
    THREADS, QUICK = 2, False


class Page(NamedTuple):
    "What the execution of one page brought back."

    error: str = ""  # why it stopped; empty when it ran to its end
    differences: list = []  # one text per cell whose output is not the committed one
    warnings: list = []  # one text per cell that wrote to stderr
    cpu: float = 0.0  # CPU seconds, of its own child processes too


# --- in the child process: execute the cells, compare what they show ---


def run_page(path, answer):
    "Execute the page at `path` and send a `Page`: the whole life of a child process."
    import pandas
    import torch

    pandas.set_option("display.max_columns", 20)  # as in a notebook; elsewhere the width of the terminal decides
    torch.set_num_threads(THREADS)
    start = cpu_seconds()
    os.chdir(path.parent)
    sys.path.insert(0, str(ROOT))
    try:
        page = execute(path)
    except Exception:  # not a failing cell: the notebook cannot be read, or an output not shown
        page = Page(f"{path.name} could not be executed\n\n{traceback.format_exc()}")
    answer.send(page._replace(cpu=cpu_seconds() - start))


def cpu_seconds():
    "CPU seconds of this process and of its finished children."
    return sum(os.times()[:4])


def execute(path):
    "Run the cells of the page in order, up to the first that fails."
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor

    shell, differences, warnings = CaptureShell(path, mpl_format="png"), [], []
    for number, cell in enumerate(NBProcessor(path, rm_directives=False).nb.cells, start=1):
        if is_skipped(cell):
            continue
        outputs, stderr, error = run_cell(shell, cell.source)
        if error:
            return Page(f"{path.name} cell {number} failed\n\n{excerpt(cell.source)}\n\n{error}", differences, warnings)
        if stderr:
            warnings.append(f"{path.name} cell {number} wrote to stderr: {stderr.strip()[:500]}")
        if difference := compare(shown(cell.outputs), shown(outputs), "volatile" in cell.directives_):
            differences.append(f"{path.name} cell {number}: {difference}\nThe cell:\n{excerpt(cell.source)}")
    return Page("", differences, warnings)


def is_skipped(cell):
    "Text, and code that carries a skipped flag or `eval: false`."
    flags = cell.directives_ or {}
    return cell.cell_type != "code" or bool(SKIPPED & flags.keys()) or flags.get("eval:", [""])[0].lower() == "false"


def run_cell(shell, source):
    "Outputs in notebook form, the text written to stderr, and the traceback (empty when all is well)."
    ran = shell.run_cell(source + "\n#")  # the comment: execnb forgets what a cell prints that ends with a semicolon
    outputs = [{"name": "stdout", "text": ran.stdout}, *({"data": shown.data} for shown in ran.display_objects)]
    if ran.result.result is not None and not source.rstrip().endswith(";"):
        outputs.append({"data": shell.display_formatter.format(ran.result.result)[0]})
    return outputs, ran.stderr, trace(ran.exception) if ran.exception else ""


def trace(error):
    "The traceback from the cell on, without the frames of the shell that runs it."
    frame = error.__traceback__
    while frame is not None and "ipython-input" not in frame.tb_frame.f_code.co_filename:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame)).rstrip()


def excerpt(source, lines=12):
    "The first lines of a cell, indented."
    kept = source.splitlines()[:lines]
    return "\n".join("    " + line for line in kept + ["..."] * (len(source.splitlines()) > lines))


# --- what a reader sees of a cell, and when two such texts are the same ---

HANDLE = re.compile(r"\[?\(?<(Axes|Figure|matplotlib\.|AxesSubplot)[^\n]*>[^\n]*|Text\([^\n]*\)")  # drawing calls return these
NOISE = re.compile(r" at 0x[0-9a-fA-F]+|\x1b\[[0-9;]*m")  # addresses, colours
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def shown(outputs):
    "What the outputs show: printed text, then results as text; pictures are counted, widgets left out."
    printed = "".join("".join(out["text"]) for out in outputs if out.get("name") == "stdout")
    rich = [out["data"] for out in outputs if "data" in out and not any("widget" in kind for kind in out["data"])]
    plain = [data for data in rich if not is_picture(data)]
    results = ["".join(data.get("text/markdown") or data.get("text/plain", "")) for data in plain]
    text = NOISE.sub("", "\n".join([printed, *results]))
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not HANDLE.fullmatch(line.strip())]
    return "\n".join(lines + ["[picture]"] * (len(rich) - len(plain)))


def is_picture(data):
    "Whether one output is a drawing, which is not compared."
    return any(kind.startswith("image/") for kind in data)


def compare(committed, now, volatile=False):
    "How the text of a cell departs from the committed one; None when it does not. A volatile cell only has to have one."
    if volatile and (committed or not now):
        return None
    if same(committed, now):
        return None
    if not committed:
        return f"the page has no committed output, and now there is\n{now[:2000]}"
    diff = difflib.unified_diff(committed.splitlines(), now.splitlines(), "committed", "now", lineterm="", n=0)
    return "committed and new output differ\n" + "\n".join(list(diff)[:40])


def same(old, new):
    "Equal but for white space and for the last digits of numbers with a fraction."
    template = ["".join(NUMBER.sub("#", text).split()) for text in (old, new)]
    return template[0] == template[1] and all(map(close, NUMBER.findall(old), NUMBER.findall(new)))


def close(old, new):
    "Whether two printed numbers agree: integers exactly, others to a relative 1e-3 or an absolute 1e-6."
    whole = all(number.lstrip("+-").isdigit() for number in (old, new))
    return old == new or (not whole and math.isclose(float(old), float(new), rel_tol=1e-3, abs_tol=1e-6))


# --- in the parent: a small pool, and the tests ---


class Pool:
    "Runs each page once, `WORKERS` at a time; both tests of a page ask for the same result."

    def __init__(self, paths):
        os.environ.update(ENVIRONMENT)
        CONTEXT.set_forkserver_preload(PRELOAD)
        self.children, self.threads = [], ThreadPoolExecutor(WORKERS)
        self.pages = {path: self.threads.submit(self.run, path) for path in paths}

    def run(self, path):
        "The page's result, out of a child process that is never waited for beyond the time limit."
        listen, answer = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=run_page, args=(path, answer), name=path.stem)
        child.start()
        answer.close()
        self.children.append(child)
        try:
            page = listen.recv() if listen.poll(TIME_LIMIT) else None
            child.join(10 if page else 0)  # at its exit it removes its temporary folders
            return page or Page(f"{path.name} took more than {TIME_LIMIT:g} s (NB_TIMEOUT)")
        except EOFError:
            child.join(10)
            return Page(f"{path.name}: its process died (exit status {child.exitcode})")
        finally:
            child.kill()

    def close(self):
        "Forget the pages that wait, end those that run."
        self.threads.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.kill()


POOL = pytest.StashKey()


class Notebook(pytest.File):
    "One page."

    def collect(self):
        yield Runs.from_parent(self, name="runs")
        yield Outputs.from_parent(self, name="outputs")


class PageTest(pytest.Item):
    "A test of one page; waits for its result."

    def page(self):
        return self.config.stash[POOL].pages[self.path].result()

    def reportinfo(self):
        return self.path, 0, f"{self.path.stem} {self.name}"


class Runs(PageTest):
    "Every cell executes, and the quick run is short."

    def runtest(self):
        page = self.page()
        for text in page.warnings:
            self.warn(pytest.PytestWarning(text))
        if page.error:
            pytest.fail(page.error, pytrace=False)
        if QUICK and page.cpu > CPU_LIMIT:
            text = f"{self.path.name} took {page.cpu:.0f} CPU seconds, {CPU_LIMIT:.0f} are allowed: make cells `slow`"
            pytest.fail(text, pytrace=False) if page.cpu > 2 * CPU_LIMIT else self.warn(pytest.PytestWarning(text))


class Outputs(PageTest):
    "The committed outputs are what the cells show now."

    def runtest(self):
        page = self.page()
        if page.error:
            pytest.skip("the page did not run to its end")
        if SCALE != "cpu":
            pytest.skip("pages are committed at the cpu scale")
        if page.differences:
            pytest.fail("\n\n".join(page.differences), pytrace=False)


def pytest_ignore_collect(collection_path, config):
    "A copy of this file in another folder (a docs build makes one) collects nothing there."
    return None if HERE == NBS else True


def pytest_collect_file(file_path, parent):
    "Every notebook of nbs/ that nbdev would test."
    if file_path.suffix == ".ipynb" and file_path.parent == NBS and file_path.name[0] not in "_.":
        return Notebook.from_parent(parent, path=file_path)


def pytest_collection_finish(session):
    "Start the pages; the tests then wait for them one by one."
    paths = dict.fromkeys(item.path for item in session.items if isinstance(item, PageTest))
    if paths and not session.config.option.collectonly:
        session.config.stash[POOL] = Pool(paths)


def pytest_sessionfinish(session):
    "Leave no process behind, also after Ctrl-C or `-x`."
    if pool := session.config.stash.get(POOL, None):
        pool.close()


def pytest_terminal_summary(terminalreporter, config):
    "CPU seconds of each page, slowest first."
    pool = config.stash.get(POOL, None)
    done = [(f.result().cpu, path.stem) for path, f in pool.pages.items() if f.done() and not f.cancelled()] if pool else []
    if done:
        terminalreporter.section(f"CPU seconds of the pages (a quick run: at most {CPU_LIMIT:.0f})")
        for seconds, name in sorted(done, reverse=True):
            terminalreporter.line(f"{seconds:7.1f}  {name}{'  <-- over' if QUICK and seconds > CPU_LIMIT else ''}")
