"""Two models, the same pictures and questions: what the one does to the other's embeddings and answers.

facts     what is compared, as numbers
asking    each model in turn, alone in memory, without anything cached
encoders  encoders without an LLM, by onnxruntime or rknn-toolkit2's simulator
judge     how well an answer goes with its picture, by a CLIP model of the user's
report    JSON, CSV and a page with the pictures
"""
