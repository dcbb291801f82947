__version__ = "0.1.0"


def __getattr__(name):
    # PyTorch and transformers are only imported when they are asked for
    if name == 'load_pruned':
        from .export.hf import load_pruned
        return load_pruned
    if name == 'load_elastic':
        from .pipeline.dynamic import load_elastic
        return load_elastic
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
