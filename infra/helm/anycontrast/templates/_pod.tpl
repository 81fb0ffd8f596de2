{{/* What head, workers, submitter and tests have in common: security, environment, volumes. */}}

{{/* Security of a pod; satisfies Pod Security "restricted". */}}
{{- define "anycontrast.podSecurityContext" -}}
{{- with .Values.podSecurity -}}
runAsNonRoot: true
runAsUser: {{ .runAsUser | int }}
runAsGroup: {{ .runAsGroup | int }}
fsGroup: {{ .fsGroup | int }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- end -}}

{{/* Security of a container: (dict "root" $ "capabilities" YAML). */}}
{{- define "anycontrast.securityContext" -}}
allowPrivilegeEscalation: false
runAsNonRoot: true
readOnlyRootFilesystem: {{ .root.Values.podSecurity.readOnlyRootFilesystem }}
capabilities:
  {{- .capabilities | default "drop: [ALL]" | nindent 2 }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Whether a component has the cache; the node's disk is for workers. Empty means no:
(dict "root" $ "component" "head"). */}}
{{- define "anycontrast.hasCache" -}}
{{- $kind := .root.Values.storage.cache.kind -}}
{{- if or (eq $kind "persistentVolumeClaim") (and (eq $kind "nodeNvme") (eq .component "worker")) -}}yes{{- end -}}
{{- end -}}

{{/* Local disk of a pod, an emptyDir as cache included: (dict "root" $ "component" "worker"
"ephemeralStorage" SIZE). */}}
{{- define "anycontrast.ephemeralStorage" -}}
{{- $cache := .root.Values.storage.cache -}}
{{- if and (eq .component "worker") (eq $cache.kind "nodeNvme") (not $cache.storageClassName) -}}
{{- add (include "anycontrast.mebibytes" .ephemeralStorage) (include "anycontrast.mebibytes" $cache.size) -}}Mi
{{- else -}}
{{- .ephemeralStorage -}}
{{- end -}}
{{- end -}}

{{/* Environment of Ray's containers: (dict "root" $ "component" "head"). */}}
{{- define "anycontrast.env" -}}
{{- $root := .root -}}
{{- $storage := $root.Values.storage -}}
# The operator adds the token; an operator too old to know tokens leaves it out, and Ray then
# refuses to start instead of running open.
- name: RAY_AUTH_MODE
  value: {{ $root.Values.auth.mode | quote }}
- name: RAY_TRAIN_V2_ENABLED
  value: "1"
{{- if include "anycontrast.hasCache" . }}
# Releases that are pulled; shards have their own folder, named to the recipe.
- name: ANYCONTRAST_CACHE
  value: {{ $storage.cache.mountPath }}/releases
{{- end }}
{{- if $storage.objectStore.enabled }}
{{ include "anycontrast.objectStoreEnv" $root }}
{{- end }}
{{- with $root.Values.pods.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "anycontrast.objectStoreEnv" -}}
{{- $store := .Values.storage.objectStore -}}
{{- $secret := $store.existingSecret -}}
{{- $fromSecret := eq $store.credentials "existingSecret" -}}
{{- if eq $store.provider "s3" -}}
- name: AWS_EC2_METADATA_DISABLED
  value: {{ $fromSecret | quote }}
{{- with $store.region }}
- name: AWS_REGION
  value: {{ . | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ . | quote }}
{{- end }}
{{- with $store.endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{- if $fromSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ $secret.name | quote }}
      key: {{ $secret.accessKeyIdKey | quote }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ $secret.name | quote }}
      key: {{ $secret.secretAccessKeyKey | quote }}
{{- end }}
{{- else if $fromSecret -}}
- name: GOOGLE_APPLICATION_CREDENTIALS
  value: /var/run/secrets/anycontrast/object-store/{{ $secret.fileKey }}
{{- end }}
{{- end -}}

{{/* Whether a credentials file is mounted; empty means no. */}}
{{- define "anycontrast.hasCredentialsFile" -}}
{{- $store := .Values.storage.objectStore -}}
{{- if and $store.enabled (eq $store.provider "gcs") (eq $store.credentials "existingSecret") -}}yes{{- end -}}
{{- end -}}

{{/* Volumes of head and workers: (dict "root" $ "component" "head" "sharedMemory" SIZE
"ephemeralStorage" SIZE). */}}
{{- define "anycontrast.volumes" -}}
{{- $root := .root -}}
{{- $storage := $root.Values.storage -}}
# KubeRay would add these two itself, without a limit; it keeps volumes of these names.
- name: shared-mem
  emptyDir:
    medium: Memory
    sizeLimit: {{ .sharedMemory | quote }}
- name: ray-logs
  emptyDir:
    sizeLimit: {{ .ephemeralStorage | quote }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .ephemeralStorage | quote }}
{{- if $storage.runs.enabled }}
- name: runs
  persistentVolumeClaim:
    claimName: {{ $storage.runs.existingClaim | default (printf "%s-runs" (include "anycontrast.fullname" $root)) | quote }}
{{- end }}
{{- if include "anycontrast.hasCache" . }}
- name: cache
{{- if eq $storage.cache.kind "persistentVolumeClaim" }}
  persistentVolumeClaim:
    claimName: {{ $storage.cache.existingClaim | default (printf "%s-cache" (include "anycontrast.fullname" $root)) | quote }}
{{- else if $storage.cache.storageClassName }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ $storage.cache.storageClassName | quote }}
        resources:
          requests:
            storage: {{ $storage.cache.size | quote }}
{{- else }}
  emptyDir:
    sizeLimit: {{ $storage.cache.size | quote }}
{{- end }}
{{- end }}
{{- range $storage.datasets }}
- name: dataset-{{ .name }}
{{- if .claimName }}
  persistentVolumeClaim:
    claimName: {{ .claimName | quote }}
    readOnly: {{ dig "readOnly" true . }}
{{- else if .nfs }}
  nfs:
    server: {{ .nfs.server | quote }}
    path: {{ .nfs.path | quote }}
    readOnly: {{ dig "readOnly" true . }}
{{- else }}
  csi:
    driver: {{ .csi.driver | quote }}
    readOnly: {{ dig "readOnly" true . }}
    {{- with .csi.volumeAttributes }}
    volumeAttributes:
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
{{- end }}
{{- if include "anycontrast.hasCredentialsFile" $root }}
- name: object-store-credentials
  secret:
    secretName: {{ $storage.objectStore.existingSecret.name | quote }}
    defaultMode: 0440
{{- end }}
{{- if $root.Values.logs.sidecar }}
- name: log-shipper
  configMap:
    name: "{{ include "anycontrast.fullname" $root }}-log-shipper"
{{- end }}
{{- with $root.Values.pods.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where Ray's container mounts them: (dict "root" $ "component" "head"). */}}
{{- define "anycontrast.volumeMounts" -}}
{{- $root := .root -}}
{{- $storage := $root.Values.storage -}}
- name: shared-mem
  mountPath: /dev/shm
- name: tmp
  mountPath: /tmp
- name: ray-logs
  mountPath: /tmp/ray
{{- if $storage.runs.enabled }}
- name: runs
  mountPath: {{ $storage.runs.mountPath | quote }}
{{- end }}
{{- if include "anycontrast.hasCache" . }}
- name: cache
  mountPath: {{ $storage.cache.mountPath | quote }}
{{- end }}
{{- range $storage.datasets }}
- name: dataset-{{ .name }}
  mountPath: {{ .mountPath | quote }}
  readOnly: {{ dig "readOnly" true . }}
{{- end }}
{{- if include "anycontrast.hasCredentialsFile" $root }}
- name: object-store-credentials
  mountPath: /var/run/secrets/anycontrast/object-store
  readOnly: true
{{- end }}
{{- with $root.Values.pods.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The log shipper's container. */}}
{{- define "anycontrast.logSidecar" -}}
- name: log-shipper
  image: {{ include "anycontrast.imageReference" (dict "image" .Values.logs.image "tag" "") | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
  args: [--config, /etc/log-shipper/fluent-bit.yaml]
  securityContext:
    {{- include "anycontrast.securityContext" (dict "root" .) | nindent 4 }}
  resources:
    {{- include "anycontrast.resources" (dict "cpu" .Values.logs.cpu "memory" .Values.logs.memory) | nindent 4 }}
  volumeMounts:
    - name: ray-logs
      mountPath: /tmp/ray
      readOnly: true
    - name: log-shipper
      mountPath: /etc/log-shipper
      readOnly: true
{{- end -}}
