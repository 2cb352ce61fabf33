"""Views of a tree of modules: text, HTML, output shapes, and the path of an error."""
