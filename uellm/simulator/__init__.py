"""A mesh in simulated time: the policies of the service, on engines that only count seconds.

The scheduler and the engines are models; what they ask is the very code that serves. Nothing here
reads a clock, and randomness is an argument: a run is a function of its requests and settings.
"""
