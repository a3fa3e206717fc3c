"""``signbit bench``: how fast packed weights are multiplied with, and models decoded, on this machine."""

from signbit.bench.decode import bench_decode
from signbit.bench.gpu import bench_gpu
from signbit.bench.kernels import bench_kernels
from signbit.bench.random_layouts import MAKERS

__all__ = ["MAKERS", "bench_decode", "bench_gpu", "bench_kernels"]
