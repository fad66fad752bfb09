"""From a notebook as it is written to a page: a Sphinx extension.

Before a notebook is parsed: nbdev's directives act, `show_doc(X)` becomes autodoc, names in backticks become links, the
module's other public names get an API section, and the index gets the sidebar. When autodoc reads a docstring: it is
Markdown, and the comments beside the parameters are its fields."""
import ast
import importlib
import inspect
import json
import re
from dataclasses import is_dataclass
from html import escape

from docutils import nodes
from docutils.utils import new_document
from fastcore.docments import docments
from fastcore.nbio import dict2nb, mk_cell, nb2dict
from myst_parser.mocking import MockRSTParser
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, strip_ansi
from sphinx.util.docutils import SphinxDirective

PKG = "fastrl_pipes"
# The sidebar: rooms by floor, ground floor first; a folder that is not listed comes last, under its own name.
ROOMS = ["foundations", "functional", "networks", "pipes", "envs", "memory", "exploration", "loggers", "agents", "learner",
         "processors", "distributed", "cli"]
TITLES = {"envs": "Environments", "learner": "Learners", "processors": "Loss processors", "cli": "Command line"}

# --- names -----------------------------------------------------------------------------------------------------------
def public(mod):
    "`{name: object}` of the functions and classes that the module `mod` (below the package) defines and exports"
    m = importlib.import_module(f"{PKG}.{mod}")
    found = {n: getattr(m, n) for n in getattr(m, "__all__", [])}
    return {n: o for n, o in found.items() if callable(o) and getattr(o, "__module__", "") == m.__name__}

def index():
    "`{name as it may be written: [full names]}` of everything public, from nbdev's own index"
    res = {}
    for mod, syms in importlib.import_module(f"{PKG}._modidx").d["syms"].items():
        names = public(mod.removeprefix(f"{PKG}."))
        for full in syms:
            short = full.removeprefix(mod + ".")
            if short.split(".")[0] in names: res.setdefault(short, []).append(full); res[full] = [full]
    return res

def link_names(md, names, mod):
    "Backticked public names become references; where several modules share a name, this notebook's own wins, or none"
    def link(m):
        full = names.get(m[1], [])
        full = [f for f in full if f.startswith(f"{PKG}.{mod}.")] or full
        return f"{{py:obj}}`{m[1]}{m[2] or ''} <{full[0]}>`" if len(full) == 1 else m[0]
    out, fenced = [], False
    for line in md.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        skip = fenced or line.startswith(("#", "    "))
        out.append(line if skip else re.sub(r"(?<![`\[}\w])`([A-Za-z_][\w.]*)(\(\))?`(?!`)", link, line))
    return "\n".join(out)

# --- notebooks -------------------------------------------------------------------------------------------------------
def markdown(src, app):
    "GitHub's callouts become admonitions, and links that leave nbs/ go to the repository"
    def callout(m): return f":::{{{m[1].lower()}}}\n" + re.sub(r"^> ?", "", m[2], flags=re.M) + "\n:::"
    src = re.sub(r"^> \[!(NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]\n((?:>.*(?:\n|$))*)", callout, src, flags=re.M)
    return re.sub(r"\]\((?:\.\./)+([^)\s]+)\)", rf"]({app.config.repository}/blob/main/\1)", src)

def tags(cell):
    "myst-nb's tags for a code cell's directives; imports alone are folded"
    d, tree = cell.directives_, cell.parsed_() or []
    imports = tree and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in tree)
    said = lambda key, value: str(d.get(key, "")).lower() == value
    rules = {"exported": d.keys() & {"export", "exports", "exporti"}, "hide-input": imports,
             "remove-input": said("echo", "false"), "remove-output": said("output", "false")}
    return [tag for tag, on in rules.items() if on]

def auto(full, exclude=()):
    "A markdown cell with the API directive for a full name"
    return mk_cell(f"```{{api}} {full}\n:exclude-members: {', '.join(exclude) or 'none'}\n```", "markdown")

def shown(cell):
    "The names of `show_doc(...)` calls in a cell"
    calls = [o.value for o in (cell.parsed_() or []) if isinstance(o, ast.Expr) and isinstance(o.value, ast.Call)]
    return [ast.unparse(c.args[0]) for c in calls if getattr(c.func, "id", "") == "show_doc"]

def page(nb, app):
    "Change the notebook `nb` in place to what a reader of the site sees"
    proc = NBProcessor(nb=nb, procs=[hide_, hide_line, filter_stream_, strip_ansi, clean_magics])
    mod = next((c.directives_["default_exp"] for c in nb.cells if "default_exp" in c.directives_), "")
    proc.process()
    here = public(mod) if mod else {}
    done = [n for c in nb.cells if c.cell_type == "code" for n in shown(c)]
    def doc(name):  # a class leaves out the methods that are shown by themselves
        full = f"{PKG}.{mod}.{name}" if name.split(".")[0] in here else app.nbdoc_names[name][0]
        return auto(full, [n.split(".")[1] for n in done if n.startswith(name + ".")])
    cells = []
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.set_source(link_names(markdown(c.source, app), app.nbdoc_names, mod))
            cells.append(c)
        elif c.cell_type != "code" or not c.source.strip() or str(c.directives_.get("include", "")).lower() == "false": continue
        elif names := shown(c): cells += [doc(n) for n in names]
        else:
            c.metadata["tags"] = [*c.metadata.get("tags", []), *tags(c)]
            cells.append(c)
    rest = [n for n in here if n not in done]
    nb.cells = cells + [mk_cell("## API", "markdown")]*bool(rest) + [doc(n) for n in rest]

def room(docname):
    "Where a page stands in the sidebar: its folder without its number, or the ground floor"
    *folder, stem = [re.sub(r"^\d+[a-z]?_", "", o) for o in docname.split("/")]
    return folder[0] if folder else stem if stem in ROOMS else ROOMS[0]

def sidebar(docs):
    "One hidden toctree per room, ground floor first"
    rooms = {}
    for d in sorted(docs): rooms.setdefault(room(d), []).append(d)
    order = sorted(rooms, key=lambda r: (ROOMS.index(r) if r in ROOMS else len(ROOMS), r))
    trees = ["```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```" % (TITLES.get(r, r.capitalize()), "\n".join(rooms[r])) for r in order]
    return mk_cell("\n\n".join(trees), "markdown")

def source_read(app, docname, source):
    "Sphinx's `source-read`: the notebook's JSON in, the page's JSON out"
    if not str(app.env.doc2path(docname)).endswith(".ipynb"): return
    nb = dict2nb(json.loads(source[0]))
    page(nb, app)
    if docname == app.config.root_doc: nb.cells.append(sidebar(app.env.found_docs - {docname}))
    source[0] = json.dumps(nb2dict(nb))

# --- docstrings ------------------------------------------------------------------------------------------------------
def rst(text):
    "Markdown of a docstring as reStructuredText: code, maths and plain text, each kept from being read as markup"
    def piece(s):
        if s.startswith("`"): return "``" + s.strip("` ").replace("`", "'") + "``"
        if s.startswith("$"): return ":math:`" + s.strip("$ ") + "`"
        return re.sub(r"([\\*|_<>])", r"\\\1", s)
    parts = [o for o in re.split(r"(``?[^`]+``?|(?<![\w$])\$[^$\n]+\$(?!\w))", text) if o]
    return "".join(("\\ " if i and parts[i-1][0] in "`$" and not s[0].isspace() else "")
                   + ("\\ " if s[0] in "`$" and i and not parts[i-1][-1].isspace() else "") + piece(s) for i, s in enumerate(parts))

def body(lines):
    "A docstring's lines: paragraphs and lists as text, indented blocks and examples as code"
    res = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        code = block.startswith((" ", "\t", ">>>"))
        res += [".. code-block:: python", "", *("   " + o for o in block.split("\n"))] if code else \
               [*(rst(o.strip()) for o in block.split("\n"))]
        res.append("")
    return res

def type_name(anno):
    "An annotation as it is written"
    if anno in (inspect.Parameter.empty, None): return ""
    return rst(re.sub(r"\b(typing|collections\.abc)\.", "", inspect.formatannotation(anno).strip("'")))

def fields(obj):
    "`:param:` and `:return:` fields from the comments beside the parameters"
    init = obj.__init__ if inspect.isclass(obj) else obj
    if not is_dataclass(obj) and not getattr(inspect.unwrap(init), "__module__", "").startswith(PKG): return []
    res = []
    for name, p in docments(obj, full=True, args_kwargs=True).items():
        said, kind = rst(" ".join((p.docment or "").split())), type_name(p.anno)
        if name == "return":
            if inspect.isclass(obj): continue
            res += [f":return: {said}"]*bool(said) + [f":rtype: {kind}"]*(kind not in ("", "None"))
        elif name != "self" and (said or kind):
            res += [f":param {name}: {said}"] + [f":type {name}: {kind}"]*bool(kind)
    return res

def docstring(app, what, name, obj, options, lines):
    "Autodoc's `autodoc-process-docstring`"
    extra = fields(obj) if what in ("class", "exception", "function", "method") else []
    lines[:] = body(lines) + extra

def signature(app, what, name, obj, options, sig, returns):
    "Autodoc's `autodoc-process-signature`: a class is called as its `__init__`, whatever a `__new__` takes"
    if what not in ("class", "exception") or sig != "(*args, **kwargs)": return None
    _, *params = inspect.signature(obj.__init__).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in params]
    return str(inspect.Signature(bare)), returns

class Api(SphinxDirective):
    "Autodoc for one full name. (It parses its own text: myst's `eval-rst` first pads it to the cell's line, a million lines.)"
    required_arguments, option_spec = 1, {"exclude-members": str}

    def run(self):
        mod, parts = self.arguments[0], []
        while True:  # the longest part that can be imported is the module
            try: obj = importlib.import_module(mod); break
            except ModuleNotFoundError: mod, _, last = mod.rpartition("."); parts.insert(0, last)
        for p in parts: obj = getattr(obj, p)
        kind = "autoclass" if inspect.isclass(obj) else "automethod" if len(parts) > 1 else "autofunction"
        lines = [f".. {kind}:: {self.arguments[0]}"]
        if kind == "autoclass":
            lines += ["   :members:", f"   :exclude-members: {self.options['exclude-members']}"]
            lines += ["   :show-inheritance:"]*(obj.__bases__ != (object,))
        doc = new_document(self.state.document["source"], self.state.document.settings)
        doc.reporter = self.state.document.reporter
        MockRSTParser().parse("\n".join(lines), doc)
        return doc.children

# --- diagrams --------------------------------------------------------------------------------------------------------
class Mermaid(SphinxDirective):
    "A diagram, drawn in the reader's browser by the site's own copy of Mermaid"
    has_content = True
    def run(self): return [nodes.raw("", f'<pre class="mermaid">{escape(chr(10).join(self.content))}</pre>', format="html")]

START = "mermaid.initialize({startOnLoad: true, theme: matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'neutral'})"

def diagrams(app, pagename, templatename, context, doctree):
    "Only pages with a diagram load Mermaid"
    if '<pre class="mermaid">' not in context.get("body", ""): return
    app.add_js_file("mermaid.min.js")
    app.add_js_file(None, body=START)

def setup(app):
    app.add_config_value("repository", "", "env")
    app.add_directive("api", Api)
    app.add_directive("mermaid", Mermaid)
    app.connect("builder-inited", lambda app: setattr(app, "nbdoc_names", index()))
    app.connect("source-read", source_read)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("html-page-context", diagrams)
    return {"parallel_read_safe": True}
