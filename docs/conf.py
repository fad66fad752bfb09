"""Sphinx, over the notebooks in nbs/. `docs/build` runs it."""
import sys
from importlib.metadata import metadata
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))
meta = metadata("fastrl_pipes")
urls = dict(o.split(", ") for o in meta.get_all("Project-URL"))

project, author, version = meta["Name"], meta["Author"], meta["Version"]
release, copyright = version, author
repository = urls["Repository"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "nbdoc"]
exclude_patterns = ["**/.ipynb_checkpoints", "**/_*", "llms.txt"]
nb_execution_mode = "off"      # the outputs are in the notebooks
nb_merge_streams = True
nb_render_markdown_format = "myst"  # what a cell makes as Markdown may have tables and diagrams, too
nb_code_prompt_show = nb_code_prompt_hide = "Imports"  # the only cells that nbdoc folds
nb_ipywidgets_js = {}          # nothing is loaded from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # a widget's HTML and text versions are shown

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints = "none"     # nbdoc puts types beside the parameters' comments
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = project
html_static_path = ["static", "_vendor"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}}  # its menu can load more scripts, from elsewhere
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme_options = {
    "source_repository": repository + "/", "source_branch": "main", "source_directory": "nbs/",
    "light_css_variables": {"color-brand-primary": "#0b6e5f", "color-brand-content": "#0b6e5f"},
    "dark_css_variables": {"color-brand-primary": "#5fd3bc", "color-brand-content": "#5fd3bc"},
}
