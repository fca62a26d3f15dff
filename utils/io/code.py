"""Which code makes a result: a digest of what modules do, that comments, docstrings and layout don't enter."""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def digest_of_code(*places: str) -> str:
    """Return one hash of all Python files at `places`: folders or files, relative to the repository."""
    digest = hashlib.sha256()
    for path in sorted(_files(places)):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not _is_text(part)]
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def _files(places: Iterable[str]) -> set[Path]:
    return {file for place in places for file in _files_at(ROOT / place)}


def _files_at(path: Path) -> list[Path]:
    return [path] if path.suffix == ".py" else list(path.rglob("*.py"))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
