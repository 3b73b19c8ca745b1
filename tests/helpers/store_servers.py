"""S3 and Google Cloud Storage on loopback, for tests: prints their two addresses, and serves until stdin ends.

moto checks If-Match and If-None-Match as S3 does. gcp-storage-emulator ignores ifGenerationMatch; `with_precondition`
adds what https://cloud.google.com/storage/docs/request-preconditions says of it.
"""

import json
import logging
import sys
from http import HTTPStatus


def main() -> None:
    import boto3
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects
    from moto.server import ThreadedMotoServer

    logging.disable(logging.CRITICAL)

    def with_precondition(request, response, storage, *arguments, **options):
        wanted = request.query.get("ifGenerationMatch")
        if wanted:
            try:
                now = storage.get_file_obj(request.params["bucket_name"], request.query["name"][0])["generation"]
            except NotFound:
                now = "0"
            if wanted[0] != now:
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
                return None
        return insert(request, response, storage, *arguments, **options)

    insert = objects.insert
    for _, methods in server.HANDLERS:
        for method, handler in methods.items():
            if handler is insert:
                methods[method] = with_precondition
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    s3 = "http://{}:{}".format(*moto.get_host_and_port())
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=s3, **keys).create_bucket(Bucket="bucket")
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    port = emulator._api._httpd.socket.getsockname()[1]
    print(json.dumps({"s3": s3, "gs": f"http://127.0.0.1:{port}"}), flush=True)
    sys.stdin.read()
    emulator.stop()
    moto.stop()


if __name__ == "__main__":
    main()
