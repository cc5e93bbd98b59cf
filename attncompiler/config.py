from types import SimpleNamespace
def parse_options(options, mode):
    return SimpleNamespace(inner=(options or {}).get("inner","inductor"))
