"""Sender and Receiver: the data path between two processes, layer by layer over one connection.

Each side drives a sans-I/O session: read bytes into the stream reader's buffers, hand every event
to the session, send the frames that it answers with. Codec work happens between the two.
"""

from kvprism.pipeline.background import ChunkSender, LayerSender
from kvprism.pipeline.receiver import Received, Receiver
from kvprism.pipeline.sender import Sender, Sent, Transfer

__all__ = ["ChunkSender", "LayerSender", "Received", "Receiver", "Sender", "Sent", "Transfer"]
