"""The site: the pages of this folder, and the reference of every public name."""

import steer_optim

project = "steer_optim"
author = "The steer_optim developers"
copyright = author
release = steer_optim.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nb_execution_mode = "off"  # the tests execute the notebooks
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
pygments_style = "default"
html_title = "steer_optim"
html_copy_source = False
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True
# Links to files of the repository that are no page of the site stay text; tests/test_readme.py finds them all.
suppress_warnings = ["myst.xref_missing"]
