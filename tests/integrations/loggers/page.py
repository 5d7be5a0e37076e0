"""The snippets of docs/boards.md, by heading."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "boards.md").read_text(encoding="utf-8")
PARTS = re.split(r"^##+ (.*)$", PAGE, flags=re.MULTILINE)
SNIPPETS = {
    heading: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for heading, text in zip(PARTS[1::2], PARTS[2::2], strict=True)
}
