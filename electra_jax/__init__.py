"""electra_jax: pretrain ELECTRA encoders in JAX and Flax."""
