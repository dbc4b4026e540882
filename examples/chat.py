"""A conversation about two pictures, in a program.

python examples/chat.py
"""

from pathlib import Path

import mmchat

PICTURES = Path(__file__).parent / "pictures"

with mmchat.open("demo") as rt:  # or the folder of a checkpoint
    chat = rt.session()
    for text in chat.ask("What colour is the circle?", images=[PICTURES / "shapes.png"]):
        print(text, end="", flush=True)
    print()

    reply = chat.ask("Describe the image.", images=[PICTURES / "garden.png"])
    print(reply.text)

    reply = chat.ask("What colour is the background in the first image?")  # nothing is encoded or computed again
    print(reply.text, reply.usage.n_reused, "rows reused,", reply.usage.n_prefilled, "new")

    for image in chat.images:
        print(image.id, image.size, image.slices, "slices", image.rows, "rows")
