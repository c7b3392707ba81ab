"""The Transformer runtime: data, model, and the engine that trains, evaluates and generates."""
