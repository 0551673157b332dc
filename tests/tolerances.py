"""Every tolerance of the suite, by what is compared.

A test states the number it holds its subject to by naming an entry here, so that a
loosened bound shows up in one place.
"""

# ||out - ref|| / ||ref|| of a matmul with float32 accumulation against float64.
MATMUL_RELATIVE = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}

# Gradient of the same op, one leaf.
GRADIENT_RELATIVE = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 1e-3}

# Units in the last place of float32.
ULP_NESTED_OFFSET = 4
ULP_SLICED_OPTIMIZER = 2

# An update of the fused 8-bit step against its rule: ten roundings, or the type's.
FUSED_UPDATE_RELATIVE = {"float32": 6e-7, "bfloat16": 2**-7, "float16": 2**-10}

# Float32 arithmetic of a few units in the last place, then one rounding.
ROUNDED_ONCE_RELATIVE = {"bfloat16": 1.01 * 2**-8, "float16": 1.01 * 2**-11}
# Below, steps do not shrink; or exp is over float32's end, and its reciprocal 0.
ROUNDED_ONCE_ABSOLUTE = {"bfloat16": 1e-36, "float16": 2**-14}

# Mean |error| of N(0, 1) data, block 64, float32 absmax, at 2**20 samples: published by
# the authors of bitsandbytes (nf4, fp4); the spread of the sample mean is about 6e-5.
MEAN_ABS_ERROR = {"nf4": 0.072798, "fp4": 0.096543}
MEAN_ABS_ERROR_SPREAD = 3e-4

# ||logits - ref|| / ||ref|| of a small model of random weights against float64.
LOGITS_RELATIVE = {"float32": 1e-5, "bfloat16": 5e-2}

# Cosine of each adapter's gradient, bfloat16 through 4 bits against float32.
STEP_COSINE = 0.9995

# The same of two policies of recomputation at the same parameters: of adapters whose
# gradient no attention's backward stands before, and of the others. One number of bf16
# in 100,000 rounded to its neighbour becomes 1e-5 of the latter, since the gradient of
# a softmax is a difference of numbers that are nearly equal (docs/performance.md). And
# their losses there, and their losses over eight steps.
POLICY_COSINE = 0.999999
POLICY_COSINE_AFTER_ATTENTION = 0.99995
POLICY_LOSS_RELATIVE = 1e-6
POLICY_CURVE_RELATIVE = 5e-4

# Held-out loss after training with bfloat16 adapters and float32 masters, against
# float32 adapters.
LEAN_LOSS = 0.01

# Losses and gradient norms of the first steps of a model split over devices against
# those on one: sums in another order, amplified by steps of Adam of 1e-2 (float32) and
# 1e-3 (bfloat16).
MESH_LOSS_RELATIVE = {"float32": 1e-4, "bfloat16": 5e-3}
# ||trained - trained|| / ||trained|| of their adapters after three steps, in float32.
MESH_TRAINED_RELATIVE = 1e-4
