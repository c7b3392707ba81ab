"""What ties the lab to other tools. Each uses only what ``lab`` exports, as a stranger's plugin would."""

if __name__ == "plugins":
    raise ImportError("import it as lab.plugins: a folder of this name belongs to whoever runs the lab")

# Each needs a library of its own, or slows what it looks at. It is imported by those who use it, never when the lab
# looks for plugins. Beside each, what it is asked for.
ON_REQUEST = {
    "accelerate": "trainer",
    "lightning": "trainer",
    "py_spy": "sample",
    "torch_profiler": "trace",
    "transformers": "trainer",
}
