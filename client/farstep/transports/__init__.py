"""Transports: how messages and their bytes get to a server and back.

gRPC cannot be used in a process that was forked after its first channel: its threads are not there, and their locks may be
held. Its own fork handlers mend that only while no thread is inside gRPC, which one of an attached client always is; then
they leave a child behind that hangs or crashes even if it never touches a channel, as a DataLoader's workers do not. So they
are switched off, which gRPC reads once, when it is loaded, and a child that needs a channel is refused in words.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
