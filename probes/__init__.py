"""The built-in probes, a module a subject, each with the rules that read its metrics.

Each uses only what ``lab`` exports, as a stranger's plugin would.
"""

if __name__ == "probes":
    raise ImportError("import it as lab.probes: a folder of this name belongs to whoever runs the lab")
