"""README.md from nbs/index.ipynb: its markdown, its code as fences, its text outputs. `--check` only compares."""
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by docs/readme.py from nbs/index.ipynb: edit that notebook. -->"

def outputs(cell):
    "The cell's printed text and plain results, each as one fence"
    texts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell.get("outputs", [])]
    return [f"```text\n{t.rstrip()}\n```" for t in texts if t.strip()]

def relink(md):
    "Links are relative to nbs/ in the notebook, and to the repository's top in the README"
    link = lambda m: f"]({m[2]})" if m[1] else f"](nbs/{m[2]})"
    return re.sub(r"\]\((?!\w+:|#|/)(\.\./)?([^)\s]+)\)", link, md)

def readme():
    "The text of README.md"
    nb = read_nb(ROOT/"nbs"/"index.ipynb")
    NBProcessor(nb=nb, procs=[hide_, hide_line, filter_stream_, clean_magics], process=True)
    parts = [NOTE]
    for c in nb.cells:
        src = "".join(c.source).strip()
        if c.cell_type == "markdown" and src: parts.append(relink(src))
        elif c.cell_type == "code" and src: parts += [f"```python\n{src}\n```", *outputs(c)]
    return "\n\n".join(parts) + "\n"

if __name__ == "__main__":
    path, text = ROOT/"README.md", readme()
    if "--check" not in sys.argv: path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says: run `python docs/readme.py`")
