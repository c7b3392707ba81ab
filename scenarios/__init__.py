"""The scenario files that ship with the lab, a folder a project."""

if __name__ == "scenarios":
    raise ImportError("import it as lab.scenarios: a folder of this name belongs to whoever runs the lab")
