"""The worker: a stateless daemon that claims prompts, runs episodes and delivers rollouts.

Never imports torch.
"""
