"""The core: hosted optimizers as state machines. Events in, replies out.

It imports torch, the standard library and the plain parts of farstep_wire (layouts, policies, errors), and nothing else: no
grpc, no protobuf, no clock, no file. Time comes in with each event.
"""
