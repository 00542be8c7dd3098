# Farshore as a container: one per replica region.
#
#     docker build -t farshore .
#     docker run -v $PWD/farshore.toml:/etc/farshore/farshore.toml -e AWS_REGION=us-west-2 farshore
#
# Both base images are arguments, for registries of one's own.
ARG BUILD_IMAGE=rust:1.95-bookworm
ARG RUN_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
COPY bench bench
COPY README.md LICENSE ./
# Without the embedded DynamoDB: production has the real one.
RUN cargo build --release --locked --no-default-features --features actions --bin farshore

# No shell in here: the worker, its libraries and the certificates of the base image.
FROM ${RUN_IMAGE}
COPY --from=build /src/target/release/farshore /usr/local/bin/farshore
USER nonroot
ENV FARSHORE_CONFIG=/etc/farshore/farshore.toml \
    FARSHORE_WORKER_LISTEN=0.0.0.0:9464
EXPOSE 9464
# Live, not ready: an outage elsewhere is no reason to restart.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["/usr/local/bin/farshore", "health"]
# SIGTERM drains within worker.shutdown_grace (25 s); give the container 30 s.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/farshore"]
CMD ["run"]
