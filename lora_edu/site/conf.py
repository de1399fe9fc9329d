"""Sphinx's settings for the site; what the figures' colours are to text, in light and in dark."""

BLUE, LIGHT_BLUE = "#00588f", "#7cc4f0"  # the figures' blue, dark and light enough to be read as text

project = "LoRA, measured"
html_title = project
copyright = "the authors; text and figures CC BY 4.0, code MIT"
language = "en-GB"
extensions = ["myst_nb", "sphinx.ext.githubpages"]  # the latter: a host must not leave out _static
nb_execution_mode = "off"  # book.py has run what must run
nb_ipywidgets_js = {}  # they come along: book.SCRIPTS
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "strikethrough"]
mathjax_path = "mathjax/tex-chtml.js"  # book.py puts it there, where a page has a formula
html_theme = "furo"
html_theme_options = {
    f"{name}_css_variables": dict.fromkeys(
        ["color-brand-primary", "color-brand-content", "color-brand-visited"], blue
    )
    for name, blue in (("light", BLUE), ("dark", LIGHT_BLUE))
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_css_files = ["site.css"]
html_js_files = ["page.js"]
smartquotes = False  # the text as it stands in the notebook
html_use_index = False
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # for that the search fetches each page, which a page on a disk may not
