"""The built-in faults, a module a family. Each uses only what ``lab`` exports, as a stranger's plugin would."""

if __name__ == "faults":
    raise ImportError("import it as lab.faults: a folder of this name belongs to whoever runs the lab")
