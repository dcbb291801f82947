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


def command() -> None:
    "`ffp` in a shell. Its imports take seconds: stopped by Ctrl-C there, it says so in a line, too"
    import sys
    try:
        from .pipeline.cli import app
    except KeyboardInterrupt:
        print('stopped before it began', file=sys.stderr)
        sys.exit(130)
    app()
