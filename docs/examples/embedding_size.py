"""A rule and a cause of one's own: what an embedding gives out is as large as its table."""

from __future__ import annotations

import lab

SCALED = lab.Cause(id="demo.scale", title="Scaled embedding", must=("embedding.size",), repair="Drop the factor.")


@lab.rule("embedding.size", title="Embeddings keep their size", reads=("activation.rms", "start.scale"), basis="theory")
def embedding_size(history: lab.History) -> list[lab.Symptom]:
    """A look-up gives rows of its table, so their RMS is the table's; 2 leaves room for chance."""
    seen, table = history.series("activation.rms", "tokens.out").values, history.last("start.scale", "tokens.weight")
    if not (len(seen) and table > 0):
        raise lab.NotChecked("this model has no trainable embedding called tokens")
    ratio = seen[0] / (table * 2**0.5)  # start.scale is a share of He's sqrt(2 / fan_in), and a look-up sums one
    text = f"the embedding gives out {ratio:.1f} times the size of its table"
    return [lab.Symptom("tokens", 0, ratio, "1", text)] if ratio > 2 else []
