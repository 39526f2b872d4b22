"""Measure the structure of a checkout, before and after the sub-packages.

python tests/structure.py [CHECKOUT]          # a Markdown table, from the source alone
python tests/structure.py --calls [CHECKOUT]  # what two actions enter; run with its own Python
"""

import ast
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

PACKAGES = ("diag", "optim", "studies", "app")
HEAD = ("package", "modules directly", "modules", "floors", "rooms", "floors of rooms")
HEAD += ("arrows", "arrows of rooms", "names in `__all__`", "names without underscore")


def modules(root: Path, package: str) -> dict[str, ast.Module]:
    """Parsed modules by dotted name; that of an `__init__` is its folder's."""
    paths = sorted((root / package).rglob("*.py"))
    parts = [path.relative_to(root).with_suffix("").parts for path in paths]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def imported(tree: ast.AST, folder: str) -> Iterator[str]:
    """Dotted names imported in a module in `folder`, at any depth; none for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), folder)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported(node, folder)


def arrows(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules of the same package that each module imports."""
    folders = {name.rpartition(".")[0] for name in trees} | {min(trees, key=len)}
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        folder = name if name in folders else name.rpartition(".")[0]
        taken = [one.removeprefix("kronscope.") for one in imported(tree, folder)]
        ends = {one if one in trees else one.rpartition(".")[0] for one in taken}
        found[name] = ends & trees.keys() - {name}
    return found


def rooms(names: set[str]) -> dict[str, str]:
    """Each module's room: a module directly in the package, or a sub-package with all it holds.

    A folder of folders alone, such as `optim.methods`, is no room: its folders are.
    """
    folders = {name.rpartition(".")[0] for name in names}
    split = {name.rpartition(".")[0] for name in names - folders}  # have modules of their own
    halls = {folder for folder in folders if "." not in folder or folder not in split}
    found = {}
    for name in names:
        starts = [".".join(name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1)]
        found[name] = next((start for start in starts if start not in halls), starts[0])
    return found


def floors(found: dict[str, set[str]]) -> int:
    """Floors of an import order. Raises: graphlib.CycleError, with the circle."""
    floor: dict[str, int] = {}
    for name in TopologicalSorter(found).static_order():
        floor[name] = 1 + max((floor[end] for end in found[name]), default=0)
    return max(floor.values())


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement at the top level of a module defines; imports define none."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    ends = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    return [n.id for end in ends for n in ast.walk(end) if isinstance(n, ast.Name)]


def listed(tree: ast.Module) -> int:
    """Number of names that a module's `__all__` spells out."""
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and "__all__" in defined(n)]
    return sum(isinstance(n, ast.Constant) for names in lists for n in getattr(names, "elts", []))


def row(root: Path, package: str) -> list[str | int]:
    """One package's line of the table."""
    trees = modules(root, package)
    between, room = arrows(trees), rooms(set(trees))
    halls: dict[str, set[str]] = {one: set() for one in room.values()}
    for name, ends in between.items():
        halls[room[name]] |= {room[end] for end in ends} - {room[name]}
    direct = len(list((root / package).glob("*.py")))
    named = [{n for s in tree.body for n in defined(s) if n[0] != "_"} for tree in trees.values()]
    counts = [direct, len(trees), floors(between), len(halls), floors(halls)]
    counts += [sum(map(len, some)) for some in (between.values(), halls.values())]
    return [package, *counts, sum(map(listed, trees.values())), sum(map(len, named))]


def lines(root: Path) -> dict[str, int]:
    """Lines of product code, of the tests, and of the product's docstrings."""
    product = [path for name in PACKAGES for path in (root / name).rglob("*.py")]
    files = {"product lines": product, "test lines": [*(root / "tests").rglob("*.py")]}
    counts = {n: sum(len(p.read_text().splitlines()) for p in some) for n, some in files.items()}
    nodes = [node for path in product for node in ast.walk(ast.parse(path.read_text()))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [n.body[0] for n in nodes if isinstance(n, kinds) and ast.get_docstring(n) is not None]
    docs = sum((text.end_lineno or 0) - text.lineno + 1 for text in texts)
    return {**counts, "docstring lines of the product": docs}


def watched(root: Path, act: Callable[[], object]) -> str:
    """Files of the project that an action calls into | calls in another file than the last."""
    folders = tuple(f"{root / name}{os.sep}" for name in PACKAGES)
    entered: list[str] = []

    def seen(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            entered.append(frame.f_code.co_filename)

    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(None)
    return f"{len(set(entered))} | {sum(map(str.__ne__, entered, entered[1:]))}"


def calls(root: Path) -> dict[str, str]:
    """The README's chain on a layer of a small MLP and a step of KFAC on it, each a second time."""
    import torch

    try:
        from kronscope import diag, optim
    except ImportError:  # the layout before the one import name
        import diag
        import optim
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    x, y, loss = torch.randn(16, 5), torch.randint(3, (16,)), torch.nn.CrossEntropyLoss()
    optimizer = optim.KFAC(model, likelihood="categorical")

    def chain(problem):
        block = problem.block("0")
        truth, kfac = diag.exact.ggn(problem, block), diag.approximations.kfac(problem, block)
        diag.metrics.relative_error(truth, kfac)

    counted = {}
    for _ in "cold", "warm":
        optimizer.zero_grad()
        loss(model(x), y).backward()
        problem = diag.Problem(model, loss, x, y, dtype=torch.float64)  # nothing is kept of another
        counted["block, ggn, kfac, relative_error"] = watched(root, partial(chain, problem))
        counted["KFAC.step()"] = watched(root, optimizer.step)
    return counted


def main() -> None:
    """Print what was asked for."""
    asked = [argument for argument in sys.argv[1:] if argument != "--calls"]
    root = Path(asked[0] if asked else ".").resolve()
    if "--calls" in sys.argv:
        print("| action | files entered | changes of file |\n| --- | --- | --- |")
        print(*(f"| {action} | {count} |" for action, count in calls(root).items()), sep="\n")
        return
    table = [HEAD, ["---"] * len(HEAD), *(row(root, package) for package in PACKAGES)]
    print(*(f"| {' | '.join(map(str, cells))} |" for cells in table), sep="\n")
    print("", *(f"- {what}: {count:,}" for what, count in lines(root).items()), sep="\n")


if __name__ == "__main__":
    main()
