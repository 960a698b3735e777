"""The import table of docs/design.md, read from the sources, and the promise that `import lowbit` is light.

A layer is a directory or a module directly below src/lowbit. The table lists what each may import of ours, as layers or
as single modules; its own modules are always allowed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lowbit"

EVERYTHING = "everything"
FORMAT_CORE = ("base", "files", "native", "source")
"""What is not the format of other software."""
METHOD_CORE = ("methods.base", "methods.recipe", "methods.scheme", "methods.views")
"""What is no method."""
TABLE: dict[str, set[str]] = {
    "numerics": set(),
    "data": set(),
    "kernels": {"numerics"},
    "modules": {"numerics"},
    "graph": {"numerics", "modules"},
    "methods": {"numerics", "modules", "graph.anatomy"},
    "formats": {"numerics"},
    "stream": {"numerics", "modules", "graph", *METHOD_CORE, *(f"formats.{name}" for name in FORMAT_CORE)},
    "recipes": {"methods", "numerics"},
    "runtime": {"numerics", "kernels", "modules", "graph", "formats", "stream.provenance"},
    "evaluation": {"numerics", "kernels", "modules", "graph", "formats", "runtime", "data"},
    "api": {EVERYTHING},
    "prepare": {EVERYTHING},
    "request": {"methods.recipe"},
    "budget": {EVERYTHING},
    "importing": {EVERYTHING},
    "launch": {EVERYTHING},
    "cli": {EVERYTHING},
    "arguments": {EVERYTHING},
    "screen": {EVERYTHING},
    "__init__": {"api"},
    "__main__": {"cli"},
}

HEAVY = {"transformers", "datasets", "matplotlib", "compressed_tensors", "lm_eval", "accelerate", "gguf"}
"""Imported inside functions only, so that a light command stays light."""
FORBIDDEN: dict[str, set[str]] = {"modules": HEAVY, "methods": HEAVY}
"""Third parties that a layer must not import at all."""
ONLY_TORCH = {"numerics"}
"""Layers that import torch and the standard library and nothing else."""
KERNELS = {"kernels.py": "triton", "feedback_kernel.py": "triton"}
"""Files that also import the language of GPU kernels, which comes with torch's GPU builds; others do so lazily."""

Import = tuple[str, bool, int]
"""(absolute dotted name, whether importing the module executes it, line)."""


def layer(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(tree: ast.AST, eager: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, eager
        elif isinstance(child, ast.If) and _type_checking(child.test):
            for part in child.body:
                yield from _statements(ast.Module([part], []), False)
            yield from _statements(ast.Module(child.orelse, []), eager)
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, eager and not lazy)


def _is_module(name: str) -> bool:
    below = SOURCE.joinpath(*name.split(".")[1:])
    return name.startswith("lowbit.") and (below.is_dir() or below.with_suffix(".py").is_file())


def imports(path: Path, text: str | None = None) -> Iterator[Import]:
    """Every import of a source file, relative ones resolved; `from package import module` names the module."""
    package = ["lowbit", *path.relative_to(SOURCE).parent.parts]
    for node, eager in _statements(ast.parse(path.read_text("utf8") if text is None else text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, eager, node.lineno
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            full = f"{origin}.{alias.name}"
            yield (full if _is_module(full) else origin), eager, node.lineno


def violations(path: Path, text: str | None = None) -> list[str]:
    """The table's verdict on one file, a sentence for each broken rule."""
    mine, found = layer(path), []
    for name, eager, line in imports(path, text):
        where = f"{path.relative_to(SOURCE)}:{line}: {mine} imports {name}"
        top, *below = name.split(".")
        if top == "lowbit":
            inner = ".".join(below)
            allowed = TABLE[mine] | {mine}
            if EVERYTHING not in allowed and not any(inner == a or inner.startswith(f"{a}.") for a in allowed):
                found.append(f"{where}, which the table does not allow")
        elif mine in ONLY_TORCH and top not in ("torch", KERNELS.get(path.name)) and top not in sys.stdlib_module_names:
            found.append(f"{where}, and may import torch only")
        elif top in FORBIDDEN.get(mine, ()):
            found.append(f"{where}, which it must never know of")
        elif top in HEAVY and eager:
            found.append(f"{where} when it is imported; import it inside the function that needs it")
    return found


def test_sources_obey_the_table() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 10
    unknown = {layer(path) for path in files} - TABLE.keys()
    assert not unknown, f"layers that the table does not know: {unknown}"
    broken = [line for path in files for line in violations(path)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("numerics/x.py", "import math\nimport torch.nn\nfrom .spec import Int\nfrom __future__ import annotations", 0),
        ("numerics/x.py", "import numpy", 1),
        ("numerics/x.py", "def f():\n    from ..modules import y", 1),
        ("methods/x.py", "from ..graph.anatomy import Site\nfrom .views import Stats", 0),
        ("methods/x.py", "from ..graph import anatomy", 0),
        ("methods/x.py", "from ..graph import Anything", 1),
        ("methods/x.py", "from ..stream.shards import a", 1),
        ("methods/x.py", "from .. import formats", 1),
        ("methods/x.py", "def f():\n    import transformers", 1),
        ("stream/x.py", "from ..methods.recipe import Recipe\nfrom lowbit.formats.native import write", 0),
        ("stream/x.py", "from ..methods.gptq import GPTQ", 1),
        ("graph/families/x.py", "from ..anatomy import Site\nfrom ...numerics.spec import Int", 0),
        ("graph/families/x.py", "from ...methods import base", 1),
        ("graph/x.py", "def f():\n    import transformers.models", 0),
        ("graph/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers", 0),
        ("graph/x.py", "try:\n    from transformers import x\nexcept ImportError:\n    pass", 1),
        ("graph/x.py", "class A:\n    import datasets", 1),
        ("data/x.py", "from lowbit.numerics import spec", 1),
        ("cli.py", "from . import api\nfrom .methods.gptq import GPTQ", 0),
        ("__main__.py", "from .cli import main", 0),
        ("__main__.py", "import lowbit.stream", 1),
    ],
)
def test_the_reader_sees_what_it_should(file: str, text: str, count: int) -> None:
    assert len(violations(SOURCE / file, text)) == count


def _loaded_after(statements: str) -> set[str]:
    """Top-level names of sys.modules in a fresh interpreter."""
    code = f"import sys\n{statements}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE.parent)
    assert not done.returncode, done.stderr
    return set(done.stdout.split())


def test_import_lowbit_is_light() -> None:
    loaded = _loaded_after("import lowbit")
    assert "lowbit" in loaded
    assert not loaded & {*HEAVY, "torch", "numpy", "pydantic", "yaml", "rich"}


def test_no_module_of_ours_imports_a_heavy_one() -> None:
    names = [
        ".".join(["lowbit", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
        for path in sorted(SOURCE.rglob("*.py"))
        if path.stem != "__main__" and (path.parent.name != "clients" or path.stem == "__init__")  # scripts of others
    ]
    loaded = _loaded_after("\n".join(f"import {name}" for name in names))
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_public_names() -> None:
    assert set(lowbit.__all__) == {"__version__", "evaluate", "export", "generate", "import_model", "load", "quantize"}
    assert set(lowbit.__all__) <= set(dir(lowbit))
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = lowbit.quantise


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    """A package below lowbit of the same name would replace the function as soon as something imports it."""
    public = set(lowbit.__all__) - {"__version__"}
    assert not public & {layer(path) for path in SOURCE.rglob("*.py")}
    assert all(callable(getattr(lowbit, name)) for name in public)
