"""The built-in passes, one per file; each file holds one public function with the file's name."""

if __name__ != "graphopt.passes":
    raise ImportError(f"import this package as graphopt.passes, not as {__name__}")
