"""No tensor of gradwatch's own lands on the default device, or in the default dtype."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ANY_DTYPE = {"arange", "randint", "randperm", "tensor", "as_tensor", "asarray", "full"}
FACTORIES = {
    *ANY_DTYPE,
    *("empty", "zeros", "ones", "eye", "rand", "randn", "linspace", "empty_strided"),
    *("scalar_tensor", "sparse_coo_tensor"),
}
# A user's model obeys the default device: this one is for the user's tests.
ALLOWED = {"gradwatch/testing.py"}


def calls():
    """Yields each call of a function of torch, with its file."""
    for folder in ("gradwatch", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                    yield path.relative_to(ROOT).as_posix(), node


@pytest.mark.parametrize("keyword", ["device", "dtype"])
def test_every_factory_says_where_and_what(keyword):
    """Each call of a factory of torch has ``device=``, and ``dtype=`` if values do not tell it."""
    found = []
    for path, node in calls():
        name = ast.unparse(node.func).removeprefix("torch.")
        wanted = name in (FACTORIES if keyword == "device" else FACTORIES - ANY_DTYPE)
        given = {one.arg for one in node.keywords}  # None for **like
        derived = keyword == "dtype" and name == "sparse_coo_tensor"  # that of its values
        if wanted and path not in ALLOWED and not given & {keyword, None} and not derived:
            found.append(f"{path}:{node.lineno}")
    assert not found


def test_nothing_asks_for_double():
    """``.double()`` raises where a device has no float64."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "gradwatch").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "double"
    ]
    assert not found
