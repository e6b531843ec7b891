"""The one C extension (all else is in pyproject.toml).

Optional: where it cannot be built, the pure-Python spawner is used. abi3: one wheel for every Python from 3.11 on.
`python setup.py build_ext --inplace` builds it into the checkout.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "worker_svc.supervisor.spawn._native",
            ["worker_svc/supervisor/spawn/_native.c"],
            depends=[f"worker_svc/supervisor/spawn/{name}.h" for name in ("_arch", "_child", "_pump")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
            # now: the child of a vfork must not be the first to call a function, or the dynamic linker runs in it
            extra_link_args=["-Wl,-z,now"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
