"""Launching a kernel again without what Triton does anew at each launch.

kernel[grid](...) binds the arguments, looks at each one for what was compiled in (dtype, a
multiple of 16, 1), evaluates the heuristics and looks the kernel up: tens of microseconds, for
something that is the same at every call with tensors of the same shapes, strides, dtypes and
alignment. `Launch` does it once.
"""

from triton import knobs
from triton.runtime import driver


class Launch:
    """A kernel with its grid and all arguments but the tensors: launch(*tensors).

    numbers: the arguments that follow the tensors; constants: the constexprs and launch options,
    by name. The first call goes through Triton, which compiles; the others launch what it found, on
    the current stream of the tensors' device, which has to be the current one. They are right only
    for tensors like the first ones (dispatch.run keeps a Launch by these, and sees to the device).
    """

    def __init__(self, kernel, grid: tuple, numbers: tuple, **constants):
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = (*grid, 1, 1)[:3]
        self.found: tuple | None = None  # by the first call: what the others launch

    def __call__(self, *tensors) -> None:
        if self.found is None:
            self.first(*tensors)
            return
        compiled, launch, function, packed, stream_of, device, rest = self.found
        grid, stream, hooks = self.grid, stream_of(device), knobs.runtime
        enter, leave, told = hooks.launch_enter_hook, hooks.launch_exit_hook, None
        if enter.calls or leave.calls:  # a profiler's
            told = compiled.launch_metadata(grid, stream, *tensors, *rest)
        launch(*grid, stream, function, packed, told, enter, leave, *tensors, *rest)

    def first(self, *tensors) -> None:
        """Through Triton, which compiles; the interpreter compiles nothing."""
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if compiled is not None:
            names = self.kernel.arg_names
            values = dict(zip(names, (*tensors, *self.numbers))) | self.constants
            rest = tuple(values[name] for name in names[len(tensors) :])  # constexprs too
            what = compiled.run, compiled.function, compiled.packed_metadata
            where = driver.active.get_current_stream, tensors[0].get_device()
            self.found = compiled, *what, *where, rest
