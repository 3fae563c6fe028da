"""Four fake CPU devices for all tests; must be set before JAX starts its backend."""

import os

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
if jax.__version_info__ < (0, 11):
    # The newer code generator takes twice as long to compile, and later versions do not know the flag. Commands that
    # tests start get the default again, as users do.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    jax.devices()
    os.environ["XLA_FLAGS"] = flags


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles without LLVM's optimisations: half the time, for the many small programs of numerical tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
