"""electra_jax: pretrain ELECTRA encoders (replaced-token detection) in JAX and Flax.

Downstream code needs two names, `load_discriminator` and `load_generator`; training starts with
`python -m electra_jax.train`.
"""

__version__ = "0.1.0"
__all__ = ["load_discriminator", "load_generator"]


def __getattr__(name: str):
    # Late, so that the processes that tokenise import this package without JAX.
    if name in __all__:
        from electra_jax import pretrained
        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
