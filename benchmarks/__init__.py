"""Speed and memory of a meta-step beside the plain autograd loop."""
