"""Says what a camera sees, whenever it sees something else; Ctrl-C ends it.

python examples/caption_camera.py [/dev/video0 | rtsp://... | a video]        (pip install av)
"""

import contextlib
import sys

import mmchat
from mmchat.video import captions

source = sys.argv[1] if len(sys.argv) > 1 else "/dev/video0"

with mmchat.open("demo") as rt, contextlib.suppress(KeyboardInterrupt):  # or the folder of a checkpoint
    for caption in captions(rt, source, "Describe the image.", every=1, changed=0.1):
        if not caption.carried:
            print(f"{caption.time:8.1f} s  {caption.text}", flush=True)
