"""Four fake CPU devices for all tests; must be set before JAX starts its backend."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles without LLVM's optimisations: half the time, for the many small programs of numerical tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
