def page(report): return ""
def fragment(report): return ""
