"""The command ``farstep``: look into a server, remove what it hosts, and save or restore snapshots.

====  =====================================================================================================
code  meaning
====  =====================================================================================================
0     ok
1     the server answered and refused (or speaks another protocol revision, or has a defect)
2     usage: a wrong flag, address, name or variable; nothing was sent
3     the server is unavailable: nothing answers at the address, not in time, or it is draining
4     not found: no hosted optimizer or snapshot of that name
130   interrupted by Ctrl-C, or a question was answered with no
====  =====================================================================================================

How the parts stand to each other: ``_main`` parses and turns errors into exit codes, ``_verbs`` has one function per
verb, ``_client`` alone calls the server (by grpc), ``_views`` turns its replies into the dicts that
``--json`` prints, and ``_tables`` draws those dicts for people. ``_doctor`` and ``_probe`` find out why a server cannot
be reached. ``_bench`` measures what the link to a server can do.

None of them imports torch itself: what a server sends is shown without it.
"""

from farstep.cli._main import main

__all__ = ["main"]
