"""The chunk loop: stage 0, mesh, envelopes, anchor policies, noise and schedule."""
