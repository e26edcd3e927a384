"""Plain-torch definition of every operation: one function per equation of the method, any device, fp32 and fp64.

What the other backends are tested against; speed is no goal here.
"""
