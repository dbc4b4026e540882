"""The project's measuring stick: what a conversation costs, counted and measured; `mmchat bench` runs it.

    work    counts over standard conversations: slices encoded, rows prefilled; and the board time they predict
    host    what this machine's part costs: reading pictures, gathering rows, messages, start, memory
    chat    wall time of a scripted chat, and how much of it is not the model's own
    peers   wall time of a chat, and of the same in openvino_genai

Ratios are between things measured in one run, in turns, and are medians; seconds are one machine's on one day.
"""
