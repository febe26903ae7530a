"""The Triton kernels of the fused CUDA step: `partial_sums`, `norms` and `update`. Only this file imports triton.

Every tensor is cut into chunks of CHUNK elements, and a program takes one chunk. A kernel finds its tensors in a table of
int64 with one row per tensor. A row holds the addresses of parameter, gradient, momentum buffer and compensation, the number
of elements, the index of the tensor's first chunk, the index after its last chunk, and an unused 0. chunk_tensor_ptr points
to the row number of each chunk's tensor. Arithmetic is float32, except that `norms` adds in float64. Sums are added in a
fixed order without atomics, so every run gives the same bits.

A chunk whose addresses are multiples of 16 bytes and whose length is a multiple of 8 is loaded and stored 16 bytes at a time.
Other chunks are loaded and stored element by element. Kernels hold both branches, because `static_range` makes a copy of the
code for each value of VECTOR. In the copy with VECTOR = 1, `_pointers` and `_mask` tell the compiler about the alignment.
"""

# mypy: ignore-errors
# The kernels are in Triton's language, and types are also checked without triton installed.
import triton
import triton.language as tl
from triton.runtime.driver import driver  # noqa: F401  for `triton.check_fused`


@triton.jit
def _chunk(table_ptr, tensor, chunk, CHUNK: tl.constexpr):
    """The addresses of the four tensors, the offset of the chunk in them, and its number of elements."""
    row_ptr = table_ptr + tensor.to(tl.int64) * 8
    size = tl.load(row_ptr + 4)
    start = (chunk - tl.load(row_ptr + 5)) * CHUNK
    count = tl.minimum(size - start, CHUNK).to(tl.int32)
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3), start, count


@triton.jit
def _pointers(address, start, like_ptr, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the elements of a chunk. They have the type of like_ptr."""
    pointer = address.to(like_ptr.dtype)
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + tl.arange(0, CHUNK)


@triton.jit
def _mask(count, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR:
        count = (count // 8) * 8  # the same number, but the compiler sees a multiple of 8
    return tl.arange(0, CHUNK) < count


@triton.jit
def _load(address, start, count, like_ptr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, EVICT: tl.constexpr = ""):
    """The elements of a chunk in float32, and zeros beyond its end."""
    pointers, mask = _pointers(address, start, like_ptr, CHUNK, VECTOR), _mask(count, CHUNK, VECTOR)
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def _store(address, start, count, like_ptr, values, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    pointers, mask = _pointers(address, start, like_ptr, CHUNK, VECTOR), _mask(count, CHUNK, VECTOR)
    tl.store(pointers, values, mask=mask, eviction_policy="evict_first")


@triton.jit
def _scale(grad_scale_ptr, MAXIMIZE: tl.constexpr):
    """The factor s = 1 / grad_scale, negative when maximizing."""
    scale = tl.full([], -1.0 if MAXIMIZE else 1.0, tl.float32)
    if grad_scale_ptr is not None:
        # correctly rounded, so exact for a power of two; a plain division may be off by 2 ulp
        scale = tl.div_rn(scale, tl.load(grad_scale_ptr).to(tl.float32))
    return scale


@triton.jit(do_not_specialize=["grad_scale_ptr", "param_ptr", "grad_ptr"])
def partial_sums(
    table_ptr, chunk_tensor_ptr, sums_ptr, grad_scale_ptr, param_ptr, grad_ptr, weight_decay,
    CHUNK: tl.constexpr, ADAPTED: tl.constexpr, JOINT: tl.constexpr, GRAD_NORM: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Compute three sums of squares for each chunk, of w (ADAPTED), s g + weight_decay w (JOINT) and s g (GRAD_NORM).

    `_scale` returns s. The kernel reads 8 bytes per float32 element. param_ptr and grad_ptr are passed only for their dtypes.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + chunk)
    param, grad, _, _, start, count = _chunk(table_ptr, tensor, chunk, CHUNK)
    scale = _scale(grad_scale_ptr, MAXIMIZE)
    sums_ptr += chunk.to(tl.int64) * 3
    is_aligned = ((param | grad) % 16 == 0) & (count % 8 == 0)
    for VECTOR in tl.static_range(2):
        if is_aligned == (VECTOR == 1):
            # scale before squaring, because a scaler's large factor makes squares overflow where gradients do not
            g = scale * _load(grad, start, count, grad_ptr, CHUNK, VECTOR)
            if ADAPTED:
                w = _load(param, start, count, param_ptr, CHUNK, VECTOR)
                tl.store(sums_ptr, tl.sum(w * w))
                if JOINT:
                    d = g + weight_decay * w
                    tl.store(sums_ptr + 1, tl.sum(d * d))
            if GRAD_NORM:
                tl.store(sums_ptr + 2, tl.sum(g * g))


@triton.jit
def _norm(sums_ptr, first, last, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        chunks = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + chunks * 3, mask=chunks < last, other=0.0).to(tl.float64)
    return tl.sqrt(tl.sum(total))


@triton.jit
def norms(
    table_ptr, sums_ptr, norms_ptr, BLOCK: tl.constexpr, ADAPTED: tl.constexpr, JOINT: tl.constexpr, GRAD_NORM: tl.constexpr
):  # fmt: skip
    """Compute the norms of every tensor from the sums of its chunks, with one program per tensor.

    norms_ptr gets three rows, one number per tensor: |w|, |s g + weight_decay w| (JOINT) and |s g| (GRAD_NORM).
    """
    tensor = tl.program_id(0)
    first = tl.load(table_ptr + tensor * 8 + 5)
    last = tl.load(table_ptr + tensor * 8 + 6)
    norm_ptr = norms_ptr + tensor
    if ADAPTED:
        tl.store(norm_ptr, _norm(sums_ptr, first, last, BLOCK).to(tl.float32))
    if JOINT:
        tl.store(norm_ptr + tl.num_programs(0), _norm(sums_ptr + 1, first, last, BLOCK).to(tl.float32))
    if GRAD_NORM:
        tl.store(norm_ptr + 2 * tl.num_programs(0), _norm(sums_ptr + 2, first, last, BLOCK).to(tl.float32))


@triton.jit
def _coefficients(
    param_norm, direction_norm, rate, scale, weight_decay, trust_coefficient, eps, keep,
    ADAPTED: tl.constexpr, JOINT: tl.constexpr, CLIP: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """b and c of a tensor from its norms, by the formula of `formula.py`.

    With s = 1 / grad_scale (negative when maximizing), r = lr if LR_IN_MOMENTUM else 1, and ``keep`` = 1 on a tensor's
    first step or without momentum, else 1 - dampening:

        ratio = trust_coefficient * |w| / (|s g| + weight_decay * |w| + eps)        JOINT: / (|s g + weight_decay w| + eps)
        CLIP: ratio = min(ratio / lr, 1), and 1 at lr = 0
        zero norm: ratio = 1, and decay = 0 unless JOINT; else decay = weight_decay
        b = keep * r * ratio * s        c = keep * r * ratio * decay

    Source: You, Gitman, Ginsburg, arXiv 1708.03888, Eq. 6 and Algorithm 1.
    """
    one = tl.full([], 1.0, tl.float32)
    ratio = one
    decay = one * weight_decay
    if ADAPTED:
        # != 0, not > 0, because a NaN norm must reach the parameters, as in `formula.py`
        nonzero = (param_norm != 0) & (direction_norm != 0)
        denominator = direction_norm + eps
        if not JOINT:
            denominator += weight_decay * param_norm
        ratio = trust_coefficient * param_norm / tl.where(nonzero, denominator, one)
        if CLIP:
            clipped = ratio >= rate
            ratio = tl.where(clipped, one, ratio / tl.where(clipped, one, rate))
        ratio = tl.where(nonzero, ratio, one)
        if not JOINT:
            decay = tl.where(nonzero, decay, 0.0 * one)
    ratio = ratio * keep
    if LR_IN_MOMENTUM:
        ratio = ratio * rate
    return ratio * scale, ratio * decay


@triton.jit(do_not_specialize=["param_norms_ptr", "direction_norms_ptr", "lr_ptr", "grad_scale_ptr", "gate_ptr", "param_ptr", "grad_ptr"])  # fmt: skip
def update(
    table_ptr, chunk_tensor_ptr, param_norms_ptr, direction_norms_ptr, lr_ptr, grad_scale_ptr, gate_ptr, param_ptr, grad_ptr,
    lr, momentum, weight_decay, trust_coefficient, eps, keep,
    CHUNK: tl.constexpr, ADAPTED: tl.constexpr, JOINT: tl.constexpr, CLIP: tl.constexpr, DECAYS: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, MAXIMIZE: tl.constexpr,
    KAHAN: tl.constexpr,
):  # fmt: skip
    """Set v = momentum v + b g + c w and w -= q v, with q = 1 if LR_IN_MOMENTUM else lr, and b and c of `_coefficients`.

    NESTEROV: w -= q (b g + c w + momentum v). Without MOMENTUM: w -= q (b g + c w), and there is no v.
    KAHAN: w is parameter + compensation, and the rounding error of the new parameter becomes the compensation.
    If the gate is not 0, no element is read or written. With MOMENTUM, the kernel reads 12 bytes per float32 element and
    writes 8. Chunks are visited backwards, because the L2 cache still holds what `partial_sums` read last. All elements are
    read for the last time here, so they are loaded with evict_first and do not displace data that later programs still read.
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + chunk)
    param, grad, buffer, compensation, start, count = _chunk(table_ptr, tensor, chunk, CHUNK)
    if gate_ptr is not None:
        count = tl.where(tl.load(gate_ptr) != 0, 0, count)
    one = tl.full([], 1.0, tl.float32)
    rate = one * lr if lr_ptr is None else tl.load(lr_ptr).to(tl.float32)
    param_norm = tl.load(param_norms_ptr + tensor) if ADAPTED else one
    direction_norm = tl.load(direction_norms_ptr + tensor) if ADAPTED else one
    b, c = _coefficients(
        param_norm, direction_norm, rate, _scale(grad_scale_ptr, MAXIMIZE),
        weight_decay, trust_coefficient, eps, keep, ADAPTED, JOINT, CLIP, LR_IN_MOMENTUM,
    )  # fmt: skip
    if LR_IN_MOMENTUM:
        rate = one
    is_aligned = ((param | grad | buffer | compensation) % 16 == 0) & (count % 8 == 0)
    for VECTOR in tl.static_range(2):
        if is_aligned == (VECTOR == 1):
            w = _load(param, start, count, param_ptr, CHUNK, VECTOR, "evict_first")
            if KAHAN:
                w += _load(compensation, start, count, param_ptr, CHUNK, VECTOR, "evict_first")
            step = b * _load(grad, start, count, grad_ptr, CHUNK, VECTOR, "evict_first")
            if DECAYS:
                step += c * w
            if MOMENTUM:
                v = momentum * _load(buffer, start, count, param_ptr, CHUNK, VECTOR, "evict_first") + step
                _store(buffer, start, count, param_ptr, v, CHUNK, VECTOR)
                step = step + momentum * v if NESTEROV else v
            w -= rate * step
            stored = w.to(param_ptr.dtype.element_ty)
            _store(param, start, count, param_ptr, stored, CHUNK, VECTOR)
            if KAHAN:
                _store(compensation, start, count, param_ptr, w - stored.to(tl.float32), CHUNK, VECTOR)
