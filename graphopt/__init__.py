"""graphopt: a compiler for neural networks in ONNX."""
