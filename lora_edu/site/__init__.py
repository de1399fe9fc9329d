"""The chapters as a static book: Sphinx and MyST-NB lay it out, the sliders live without a kernel.

`pages` turns a notebook into a page's source, `book` runs the chapters and builds; `static/` is what pages load of
ours. Nothing here draws a picture or knows what a chapter says.
"""
