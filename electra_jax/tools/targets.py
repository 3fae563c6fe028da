"""Devices that need not exist, to compile for: slices of TPUs (with libtpu) and GPUs (with JAX's plugin for CUDA)."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os

from electra_jax.config import UserError
from electra_jax.tools.roofline import CHIPS, Chip, parse_topology


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA's cost models ask of a GPU beside `Chip`."""

    capability: tuple[int, int]
    cores: int           # streaming multiprocessors
    lanes: int           # of float32, a core
    clock_ghz: float     # float32 peak / (2 cores lanes)
    l2_mib: int
    shared_kib: int      # a block's shared memory, at most


# Cores, L2 and float32 peak: NVIDIA's data sheets and tuning guides (A100 SXM, H100 SXM, H200 SXM, B200); the rest:
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_GPUS = {"a100": _Gpu((8, 0), 108, 64, 1.41, 40, 163), "h100": _Gpu((9, 0), 132, 128, 1.98, 50, 227),
         "h200": _Gpu((9, 0), 132, 128, 1.98, 50, 227), "b200": _Gpu((10, 0), 148, 128, 1.98, 126, 227)}
# No GPU, no timing of alternatives: products are the library's (cuBLAS, as tuning chooses for most of them), for
# untuned Triton kernels come in tiles of 16 x 8 that no tuned program has.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def compiler_options(devices: list) -> dict[str, bool | int]:
    """What to tell the compiler for these devices; a flag that XLA_FLAGS sets is the user's."""
    if devices[0].platform != "gpu":
        return {}
    return {name: value for name, value in _OPTIONS.items() if name not in os.environ.get("XLA_FLAGS", "")}


def devices(topology: str) -> list | None:
    """The devices of a topology; None for GPUs where no plugin for CUDA is installed.

    Raises UserError for TPUs without libtpu, for part of a node of GPUs, and for what the compiler refuses.
    """
    name, shape = parse_topology(topology)
    if CHIPS[name].dimensions:
        return _tpus(topology, shape)
    if shape[0] > 8 and shape[0] % 8:
        raise UserError(f"--topology={topology}: nodes have eight GPUs, give a multiple of eight or fewer than that.")
    return _gpus(topology, name, shape[0]) if has_cuda() else None


def _tpus(topology: str, shape: tuple[int, ...]) -> list:
    if importlib.util.find_spec("libtpu") is None:
        wanted = [r for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
        version = f" (the version for this jax: {wanted[0].partition(';')[0].strip()})" if wanted else ""
        raise UserError(f"--topology={topology}: compiling for TPUs needs libtpu, which is not installed: "
                        f"pip install libtpu{version}.")
    # No TPU is looked for, neither by its metadata server nor by the variables that its machines have, and none is
    # opened, so that another process with libtpu is in nobody's way.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost",
                      ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
    return _described(topology, "libtpu", "give a slice that exists", topology_name=topology, platform="tpu",
                      **options)


def has_cuda() -> bool:
    """Whether JAX's plugin for CUDA is installed; it is not imported."""
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.{name}") for name in ("xla_cuda12", "xla_cuda13"))


def _gpus(topology: str, name: str, chips: int) -> list:
    # Before the plugin is loaded, which else wants all of CUDA's libraries and asks a driver for their versions.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    nodes = -(-chips // 8)
    return _described(topology, "JAX's plugin for CUDA", "give fewer GPUs, or install the plugin's "
                      "version for this jax: pip install 'jax[cuda12]' or 'jax[cuda13]'",
                      platform="cuda", topology=f"1x{nodes}x{chips // nodes}",
                      target_config=_target(CHIPS[name], _GPUS[name]))


def _target(chip: Chip, gpu: _Gpu) -> str:
    """The compiler's description of a GPU, a GpuTargetConfigProto; of its fields those that change a program."""
    major, minor = gpu.capability
    # Threads, blocks and registers are the same for all compute capabilities since 8.0 but those of small GPUs. The
    # versions are the first that know all four GPUs: CUDA 12.8, cuDNN 9.7.
    return f"""gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock_ghz}
        memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm_bytes:.0f}
        l2_cache_size: {gpu.l2_mib * 2**20}
        shared_memory_per_block: {48 * 2**10} shared_memory_per_block_optin: {gpu.shared_kib * 2**10}
        shared_memory_per_core: {(gpu.shared_kib + 1) * 2**10}
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
        registers_per_block_limit: 65536 registers_per_core_limit: 65536
        block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535 }}
        runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 minor: 7 }}
        platform_name: "CUDA" device_description_str: "{chip.kind}" """


def _described(topology: str, compiler: str, remedy: str, /, **options) -> list:
    from jax.experimental import topologies
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:    # the compilers' errors are of JAX's one type
        raise UserError(f"--topology={topology} is refused by {compiler} ({str(error).partition(chr(10))[0]}): "
                        f"{remedy}.") from error
