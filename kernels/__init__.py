"""GPU kernels of fastl2o, one folder a rule family, each with a README: derivation, layout, cost.

Installed as ``fastl2o.kernels``. A folder holds the laboratory versions of a kernel with their
timings; ``csrc/`` holds the compiled version that is used.
"""
