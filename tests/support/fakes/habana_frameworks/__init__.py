"""A stand-in for Intel Gaudi's software that computes on the CPU, so that code for it runs without a card.

Written from what transformers, accelerate and preftree call; nothing of the vendor's. `torch.hpu` answers as one card
a process, whatever is asked of the device hpu happens on the CPU, backend hccl is gloo, and what was called is counted
in the file that $FAKE_HABANA_LOG names.
"""
