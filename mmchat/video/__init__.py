"""Captions of videos, folders of pictures, cameras and streams, for as long as they last.

from mmchat.video import captions

with mmchat.open("demo") as rt:
    for caption in captions(rt, "street.mp4", "What colour is the background?", every=2):
        print(caption.time, caption.text)
"""

from mmchat.video.loop import captions
from mmchat.video.pictures import Arrays
from mmchat.video.sources import open_source
from mmchat.video.values import Caption, Frame, Notice, Source

__all__ = ["Arrays", "Caption", "Frame", "Notice", "Source", "captions", "open_source"]
